"""What a forward of each method keeps for its backward, and what both run, from sizes alone.

`walk` goes through the forward of transformers' Llama, Qwen2 or Qwen3 with a
`bench.operators.Book`, operator by operator, with the linear layers as the method has them.

Exact, to the byte of `bench.memory.kept_by`, is what is kept on a CPU by SDPA's flash attention
(Options.attention "sdpa" or "flash"), eager, for every method, model type and dtype of 2 or 4
bytes, with and without checkpointing and full depth; with liger-kernel's operators, too.
`not_covered` says of the rest what does not fit. On CUDA nothing is checked here; the difference is
in the attention.
"""

from functools import partial

from bench.ledger import Storage, Value
from bench.methods import Budget, Options
from bench.operators import Book
from bench.projections import PROJECTIONS, Plain
from bench.steps.model_shapes import Shape


def walk(
    shape: Shape,
    batch: int,
    length: int,
    itemsize: int,
    method: str,
    budget: Budget,
    options: Options,
    device: str = "cpu",
) -> Book:
    """One forward of `method` on a batch (batch, length), with what its backward will run.

    itemsize: bytes of one number of the model, 2 or 4. device: "cpu" or "cuda".

    Raises ValueError for a method that is not known here.
    """
    if method not in PROJECTIONS:
        raise ValueError(f"method must be one of {list(PROJECTIONS)}, got {method!r}")
    book = Book(device, fused=options.liger)
    # which SDPA takes on CUDA for fp32 as well, flash being for 2 bytes only
    efficient = device == "cuda" and (options.attention == "efficient" or itemsize == 4)
    everything = method == "full"
    ends = everything or method == "lisa"

    book.part = "embedding"
    tokens = Value((batch, length), 8, False, Storage(8 * batch * length))
    table = book.parameter((shape.vocab, shape.hidden), itemsize, ends)
    x = book.embedding(tokens, table)
    # transformers asks for the gradient of the embedding's output wherever it checkpoints.
    if not x.grad and (options.full_depth or options.checkpointing or method == "frozen"):
        x.grad = True
        book.hold(x)  # as a leaf, which autograd keeps for its gradient
    cos = book.new((length, shape.head_dim), itemsize)
    sin = book.new((length, shape.head_dim), itemsize)
    if options.checkpointing:  # the arguments of every layer are kept
        book.hold(cos, sin, book.new((length,), 8))

    book.mark()
    for layer in range(shape.layers):
        # Which layers LISA has drawn does not matter: all of them keep the same.
        drawn = method == "lisa" and layer < budget.lisa_layers
        linears = everything or drawn or method == "galore"
        others = everything or drawn
        projections = PROJECTIONS[method](book, shape, budget, itemsize, linears, others)
        book.working = max(book.working, projections.working(batch * length))
        book.making = max(book.making, projections.making())
        run = partial(
            block,
            book,
            projections=projections,
            norms=others,
            cos=cos,
            sin=sin,
            efficient=efficient,
        )
        x = book.checkpoint(run, x) if options.checkpointing else run(x)
        x = projections.edit(x)
        book.mark()

    book.part = "norm"
    x = book.rms_norm(x, book.parameter((shape.hidden,), itemsize, everything))
    book.part = "head"
    head = table if shape.tied else book.parameter(table.shape, itemsize, ends)
    if options.liger:
        book.linear_cross_entropy(x, head)
        return book
    logits = book.linear(x, head)
    book.part = "loss"
    book.cross_entropy(logits)
    return book


def block(
    book: Book,
    x: Value,
    projections: Plain,
    norms: bool,
    cos: Value,
    sin: Value,
    efficient: bool,
) -> Value:
    """One decoder layer: x (batch, length, hidden) in and out.

    norms: whether they are trained; efficient: the kernel of the attention.
    """
    shape = projections.shape

    def norm(value: Value) -> Value:
        book.part = "norm"
        return book.rms_norm(value, book.parameter(value.shape[-1:], x.itemsize, norms))

    def heads(value: Value, count: int) -> Value:
        return book.view(value, (*x.shape[:2], count, shape.head_dim))

    projected = projections.qkv(norm(x))
    counts = shape.heads, shape.kv_heads, shape.kv_heads
    q, k, v = (heads(value, count) for value, count in zip(projected, counts, strict=True))
    book.part = "rope"
    q, k = book.copy_back(q), book.copy_back(k)
    if shape.model_type == "qwen3":
        q, k = norm(q), norm(k)
    book.part = "rope"
    q, k = book.rotate(q, cos, sin), book.rotate(k, cos, sin)
    book.part = "attention"
    y = book.attention(q, k, v, efficient)
    y = projections.o(book.view(y, (*x.shape[:2], shape.heads * shape.head_dim)))
    book.part = "residual"
    x = book.add(x, y)

    y = projections.mlp(norm(x))
    book.part = "residual"
    return book.add(x, y)


def not_covered(shape: Shape, itemsize: int, options: Options, device: str) -> str | None:
    """What the walk leaves out, or is not known to get right; None if nothing."""
    reasons = []
    if options.attention in ("eager", "math"):
        reasons.append(f"attention {options.attention!r} keeps the weights of the attention too")
    if options.liger:
        reasons.append("the pieces in which liger-kernel makes the logits are not counted")
    if options.compile:
        reasons.append("torch.compile fuses kernels and chooses by itself what is kept")
    if device == "cuda":
        reasons.append("what attention keeps on CUDA was not checked")
        if itemsize == 4 and shape.kv_heads < shape.heads:
            reasons.append("in fp32 grouped heads may fall back to the math kernel")
    return "; ".join(reasons) or None
