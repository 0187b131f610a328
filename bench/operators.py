"""The operators that a Llama is made of, on values that have a shape but no content.

Called on `Value`s, each one books what eager PyTorch does for it. What is kept follows PyTorch's
derivative formulas: a factor is kept if the *other* one needs a gradient, a sum keeps nothing, a
softmax keeps its result. Sums over a book are therefore closed formulas in the sizes, in the order
of the model's source.
"""

from bench.ledger import Kernel, Ledger, Value


class Book(Ledger):
    """A ledger with the operators, forward and backward at once."""

    # Pointwise operators

    def cast(self, x: Value, itemsize: int) -> Value:
        """x.to(dtype): nothing where it has that size already. Keeps nothing."""
        if x.itemsize == itemsize:
            return x
        y = self.new(x.shape, itemsize, x)
        self.run(x.nbytes + y.nbytes)
        if x.grad:
            self.run_back(x.nbytes + y.nbytes)
        self.send_grad(x)
        return y

    def add(self, a: Value, b: Value) -> Value:
        """a + b of one shape, in the wider dtype. Keeps nothing; both get the same gradient."""
        y = self.new(a.shape, max(a.itemsize, b.itemsize), a, b)
        self.run(a.nbytes + b.nbytes + y.nbytes)
        for x in (a, b):
            if x.grad and x.itemsize != y.itemsize:
                self.run_back(x.nbytes + y.nbytes)
        self.send_grad(a, b)
        return y

    def mul(self, a: Value, b: Value) -> Value:
        """a * b for a shaped like the result and b broadcast to it. Keeps the factors."""
        y = self.new(a.shape, max(a.itemsize, b.itemsize), a, b)
        if b.grad:
            self.save(a)
        if a.grad:
            self.save(b)
        self.run(a.nbytes + b.nbytes + y.nbytes)
        if a.grad:
            self.run_back(y.nbytes + b.nbytes + y.nbytes)
        if b.grad:
            self.run_back(y.nbytes + a.nbytes + y.nbytes)
            if b.numel < y.numel:
                self.run_back(y.nbytes + b.nbytes)
        self.send_grad(a, b)
        return y

    def scale(self, x: Value) -> Value:
        """x times, plus or to the power of a number of which nothing needs to be kept."""
        y = self.new(x.shape, x.itemsize, x)
        self.run(2 * x.nbytes)
        if x.grad:
            self.run_back(2 * x.nbytes)
        self.send_grad(x)
        return y

    def rms_norm(self, x: Value, weight: Value) -> Value:
        """weight * x / rms(x) in the operators of transformers, computed in fp32.

        Keeps x in fp32 (square and product), 1 / rms of every row in fp32 (its own result, and the
        product), and where weight is trained, the normed x in the dtype of x. Fused: x as it is,
        and 1 / rms.
        """
        if self.fused:
            return self._rms_norm_fused(x, weight)
        x32 = self.cast(x, 4)
        rows = (*x.shape[:-1], 1)
        square = self.new(x.shape, 4, x32)
        if x32.grad:
            self.save(x32)
        self.run(2 * x32.nbytes)
        mean = self.new(rows, 4, x32)
        self.run(square.nbytes + mean.nbytes)
        self.run(2 * mean.nbytes)  # + eps
        self.run(2 * mean.nbytes)
        inverse = self.new(rows, 4, mean)
        if x32.grad:
            self.save(inverse)
            for operands in (2, 2, 3):  # -1/2 dy y³
                self.run_back(operands * mean.nbytes)
            self.run_back(mean.nbytes + square.nbytes)  # of the mean, spread over the row
            for operands in (2, 2, 3):  # 2 x¹ dy
                self.run_back(operands * square.nbytes)
            self.send_grad(x32)
        return self.mul(self.cast(self.mul(x32, inverse), x.itemsize), weight)

    def _rms_norm_fused(self, x: Value, weight: Value) -> Value:
        y, inverse = self.new(x.shape, x.itemsize, x, weight), self.new((*x.shape[:-1], 1), 4)
        self.run(2 * x.nbytes + inverse.nbytes + weight.nbytes)
        if y.grad:
            self.save(x, inverse)
            self.run_back(3 * x.nbytes + inverse.nbytes + weight.nbytes)
        self.send_grad(x, weight)
        return y

    def rotate(self, x: Value, cos: Value, sin: Value) -> Value:
        """x cos + rotate_half(x) sin; cos and sin (length, head_dim) are kept. Fused: in place,
        after a copy where x is a part of a wider tensor."""
        if self.fused:
            return self._rotate_fused(x, cos, sin)
        half = x.nbytes // 2
        first = self.mul(x, cos)
        self.run(2 * half)  # -x2
        turned = self.new(x.shape, x.itemsize, x)
        self.run(2 * x.nbytes)  # its concatenation with x1
        if x.grad:
            self.run_back(2 * half)
            for _ in range(2):  # a half, filled up with zeros
                self.run_back(half + x.nbytes)
        self.send_grad(x, x)
        return self.add(first, self.mul(turned, sin))

    def _rotate_fused(self, x: Value, cos: Value, sin: Value) -> Value:
        if x.storage.nbytes > x.nbytes:
            self.run(2 * x.nbytes)
            x = self.new(x.shape, x.itemsize, x)
        self.run(2 * x.nbytes + cos.nbytes + sin.nbytes)
        if x.grad:
            self.save(cos, sin)
            self.run_back(2 * x.nbytes + cos.nbytes + sin.nbytes)
        return x

    def silu(self, x: Value) -> Value:
        """Keeps x."""
        y = self.new(x.shape, x.itemsize, x)
        if x.grad:
            self.save(x)
            self.run_back(3 * x.nbytes)
        self.run(2 * x.nbytes)
        self.send_grad(x)
        return y

    def copy_back(self, x: Value) -> Value:
        """A view whose gradient comes in another layout, and has to be copied into x's."""
        if x.grad:
            self.run_back(2 * x.nbytes)
        return x

    # Matrix products, attention, embedding, loss

    def gemm(
        self, m: int, n: int, k: int, itemsize: int, back: bool = False, more: int = 0
    ) -> None:
        """(m, k) times (k, n): operands are read, the result written, once; `more` bytes too."""
        nbytes = (m * k + k * n + m * n) * itemsize + more
        kernels = self.backward if back else self.forward
        kernels.append(Kernel("gemm", self.part, 2 * m * n * k, nbytes, itemsize))

    def linear(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        """x weightᵀ + bias for weight (N, K), bias (N,). Keeps x if weight is trained."""
        n, k = weight.shape
        m = x.numel // k
        y = self.new((*x.shape[:-1], n), x.itemsize, x, weight)
        if weight.grad:
            self.save(x)
        if x.grad:
            self.save(weight)
        self.gemm(m, n, k, x.itemsize, more=bias.nbytes if bias else 0)
        if x.grad:
            self.gemm(m, k, n, x.itemsize, back=True)
        if weight.grad:
            self.gemm(n, k, m, x.itemsize, back=True)
        if bias and bias.grad:
            self.run_back(y.nbytes + bias.nbytes)
        self.send_grad(x, weight)
        return y

    def attention(self, q: Value, k: Value, v: Value, efficient: bool = False) -> Value:
        """Causal attention by a flash-like kernel: (B, H, L, D), with fewer heads in k and v.

        Keeps q, k, v, the result and the logsumexp of every row in fp32. On CUDA the state of the
        random generator as well, 24 bytes (flash) or 16 (efficient, which rounds the rows up to a
        multiple of 32). FLOPs are those at or below the diagonal.
        """
        batch, heads, length, head_dim = q.shape
        y = self.new(q.shape, q.itemsize, q, k, v)
        rows = -(-length // 32) * 32 if efficient else length
        logsumexp = self.new((batch, heads, rows), 4, q)
        operands = q.nbytes + k.nbytes + v.nbytes + y.nbytes + logsumexp.nbytes
        product = batch * heads * length * (length + 1) * head_dim
        if y.grad:
            self.save(q, k, v)
        self.forward.append(Kernel("attention", self.part, 2 * product, operands, q.itemsize))
        if y.grad:
            self.save(y, logsumexp)
            if self.device == "cuda":
                self.save(self.new((2 if efficient else 3,), 8))
            operands += y.nbytes + q.nbytes + k.nbytes + v.nbytes  # their gradients
            self.backward.append(Kernel("attention", self.part, 5 * product, operands, q.itemsize))
        self.send_grad(q, k, v)
        return y

    def embedding(self, tokens: Value, table: Value) -> Value:
        """Rows of table (V, h). Keeps the tokens, which are the batch itself, if it is trained."""
        y = self.new((*tokens.shape, table.shape[1]), table.itemsize, table)
        if table.grad:
            self.save(tokens)
        self.run(tokens.nbytes + 2 * y.nbytes)
        if table.grad:
            self.run_back(tokens.nbytes + 2 * y.nbytes + table.nbytes)
        self.send_grad(table)
        return y

    def cross_entropy(self, logits: Value) -> Value:
        """The mean over all tokens of the next-token loss, in fp32.

        Keeps the log-probabilities in fp32, the labels shifted by one, int64, and the count of the
        tokens, fp32. Shifted labels of one sequence are a view of the padded ones, with one more.
        """
        batch, length, _ = logits.shape
        tokens = batch * length
        logits32 = self.cast(logits, 4)
        self.run(8 * batch * (2 * length + 1))  # padded
        if batch == 1:
            labels = self.new((length + 1,), 8)
        else:
            labels = self.new((tokens,), 8)
            self.run(2 * labels.nbytes)
        log_probabilities = self.new(logits.shape, 4, logits32)
        self.run(2 * logits32.nbytes)
        loss = self.new((), 4, logits32)
        if logits.grad:
            self.save(log_probabilities, labels)
        self.run((8 + 4) * tokens)  # one number of every row
        if logits.grad:
            self.save(self.new((), 4))
            self.run_back(logits32.nbytes + 8 * tokens)  # zeros, but for one number of every row
            self.run_back(3 * logits32.nbytes)
        self.send_grad(logits32)
        return loss

    def linear_cross_entropy(self, x: Value, weight: Value) -> Value:
        """The loss of x weightᵀ as liger-kernel has it: the logits are made in pieces, of which
        none is kept, and the gradients at once. Keeps these, of x and, if it is trained, of weight.
        """
        n, k = weight.shape
        m = x.numel // k
        loss = self.new((), 4, x, weight)
        self.part = "head"
        self.gemm(m, n, k, x.itemsize)
        if x.grad:
            self.gemm(m, k, n, x.itemsize)
        if weight.grad:
            self.gemm(n, k, m, x.itemsize)
        self.part = "loss"
        self.run(3 * m * n * x.itemsize)  # logits are read twice; their gradients are written over
        for value in (x, weight):
            if value.grad:
                self.save(self.new(value.shape, value.itemsize))
        self.send_grad(x, weight)
        return loss
