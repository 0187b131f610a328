"""One small Llama, fine-tuned by several methods side by side: python -m bench.demo."""
