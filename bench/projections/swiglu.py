"""SwiGLU of (M, F) as `s2kernels` has it: one kernel each way, or a few operators on a CPU."""

from bench.operators import Book


def forward(book: Book, m: int, f: int, itemsize: int) -> None:
    """h (M, F) from gate and up; plain torch's in two operators."""
    book.part = "swiglu"
    for operands in (2, 3) if book.device == "cpu" else (3,):
        book.run(operands * m * f * itemsize)


def backward(book: Book, m: int, f: int, r: int, itemsize: int) -> None:
    """dgate and dup (M, F) from dh, gate and up, and h (M, R) once more of R channels.

    Plain torch multiplies in fp32: of a model of 2 bytes it casts the operands and the results.
    """
    book.part = "swiglu"
    if book.device != "cpu":
        book.run_back((5 * f + r) * m * itemsize)
        return
    rebuild(book, m, r, itemsize)
    casts = () if itemsize == 4 else (4 + itemsize,) * 5
    for nbytes in (*casts, 12, 8, 12, 12):
        book.run_back(m * f * nbytes)


def rebuild(book: Book, m: int, r: int, itemsize: int) -> None:
    """h (M, R) of R channels of gate and up, which are copied first."""
    book.part = "swiglu"
    for operands in (2, 2, 2, 3) if book.device == "cpu" else (3,):
        book.run_back(operands * m * r * itemsize)


def working(itemsize: int, on_cpu: bool) -> int:
    """Bytes of a channel and token alive in the backward besides gate, up, dgate and dup: dh, and
    in plain torch one product, in fp32, with fp32 copies of all three operands of a smaller model.
    """
    if not on_cpu:
        return itemsize
    return itemsize + 4 + (0 if itemsize == 4 else 12)
