"""The linear layers of one decoder layer as the model has them, which every method changes.

Sizes: M tokens, a weight (N, K).
"""

from bench.ledger import Value
from bench.methods import Budget
from bench.operators import Book
from bench.steps.model_shapes import Shape


class Plain:
    """The linear layers as the model has them. trained: their weights; biases: their biases."""

    def __init__(
        self,
        book: Book,
        shape: Shape,
        budget: Budget,
        itemsize: int,
        trained: bool = False,
        trained_biases: bool = False,
    ) -> None:
        self.book, self.shape, self.budget, self.itemsize = book, shape, budget, itemsize
        biased = ("q_proj", "k_proj", "v_proj") if shape.model_type == "qwen2" else ()
        sizes = shape.linears()
        self.weights = {name: book.parameter(sizes[name], itemsize, trained) for name in sizes}
        self.biases = {
            name: book.parameter(sizes[name][:1], itemsize, trained_biases) for name in biased
        }

    def linear(self, x: Value, name: str) -> Value:
        return self.base(x, name)

    def base(self, x: Value, name: str) -> Value:
        """The layer as the model has it, under any method."""
        self.book.part = "linear"
        return self.book.linear(x, self.weights[name], self.biases.get(name))

    def qkv(self, x: Value) -> list[Value]:
        return [self.linear(x, name) for name in ("q_proj", "k_proj", "v_proj")]

    def o(self, x: Value) -> Value:
        return self.linear(x, "o_proj")

    def mlp(self, x: Value) -> Value:
        gate = self.linear(x, "gate_proj")
        self.book.part = "swiglu"
        activated = self.book.silu(gate)
        up = self.linear(x, "up_proj")
        self.book.part = "swiglu"
        return self.linear(self.book.mul(activated, up), "down_proj")

    def edit(self, x: Value) -> Value:
        """What a method does to the output of the layer."""
        return x

    def working(self, tokens: int) -> int:
        """The most bytes alive at once in the backward of a layer besides all that it kept.

        In the FFN dh, dgate, dup and the gradients that come from above, or in a norm four copies
        of dx in fp32.
        """
        shape = self.shape
        ffn = self.itemsize * (3 * shape.intermediate + 2 * shape.hidden)
        return tokens * max(ffn, 4 * 4 * shape.hidden)

    def making(self) -> int:
        """The most bytes alive at once in the forward of a layer that it does not keep."""
        return 0
