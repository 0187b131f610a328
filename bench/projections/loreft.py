"""LoReFT: the linear layers stay, and the output of the layer is edited."""

from bench.ledger import Value
from bench.projections.plain import Plain


class LoReFT(Plain):
    """The layer as it is; its output is edited at a few positions by an fp32 map of rank r.

    Keeps, in fp32, the output at these positions, the edit in r dimensions and what the
    orthogonal parametrization of R needs; the edit in the dtype of the model; the positions.
    """

    def edit(self, x: Value) -> Value:
        book, size = self.book, self.itemsize
        batch, length, hidden = x.shape
        rank, positions = self.budget.reft_rank, 2 * min(self.budget.reft_positions, length // 2)
        tokens = batch * positions
        book.part = "adapter"
        reflectors = book.parameter((hidden, rank), 4, trained=True)
        book.parameter((rank, hidden), 4, trained=True)
        book.parameter((rank,), 4, trained=True)
        where = book.new((positions,), 8)
        A = book.new((hidden, rank), 4, reflectors)
        Q, R = book.new((hidden, rank), 4, A), book.new((hidden, rank), 4, A)
        tau, doubled, signs = (book.new((rank,), 4) for _ in range(3))
        book.save(A, tau, doubled, signs, Q)
        book.gemm(hidden, rank, hidden, 4)  # by a fixed rotation, (hidden, hidden)
        book.gemm(hidden, rank, hidden, 4, back=True)

        at = book.new((batch, positions, hidden), 4)
        low = book.new((batch, positions, rank), 4)
        edit = book.new((batch, positions, hidden), size)
        book.save(where, at, R, low, edit)
        for back in (False, True):
            for _ in range(3 if not back else 6):
                book.gemm(tokens, rank, hidden, 4, back=back)
        book.run(2 * at.numel * size)
        book.run(at.nbytes + edit.nbytes)
        y = book.new(x.shape, size, x)
        book.run(2 * x.nbytes + 3 * edit.nbytes)  # a copy, and the edit added
        book.run_back(2 * edit.nbytes)
        if x.grad:
            book.run_back(x.nbytes + 2 * edit.nbytes)  # zeros, and the gradient at the positions
        book.send_grad(x, x)
        y.grad = True
        return y
