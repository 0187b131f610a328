"""What --help says of each command: a summary, and below it a description and examples."""

TEXTS = {
    "finetune": """\
train an adapter

Train an adapter of a causal language model: by S2FT a few attention heads and FFN channels of each
block, by SpIEL scattered entries, or LoRA beside them. The base stays as it is.

DATA are files .json (a list), .jsonl, .csv, .parquet, .txt, folders of such, or data sets of the
hub. Their fields say what they are:

  prompt, completion                    texts or messages; the completion alone is learnt
  messages, or conversations            by the tokenizer's chat template; each answer is learnt
  instruction, output, perhaps input    by the chat template or Alpaca's prompt; see --template
  text                                  all of it is learnt; what is too long is split
  chosen, rejected, perhaps prompt      preferences, by DPO

OUTPUT gets the adapter and the tokenizer, run.yaml, metrics.json, loss.svg, and checkpoints to
resume from.

examples:
  s2kernels finetune --model models/llama --data train.json --output adapter --bf16 --epochs 3
  s2kernels finetune ... --method lora --rank 8     on the same data, to compare
  s2kernels finetune ... --strategy activation --smallest    train what is least active on the data
  s2kernels finetune ... --output adapter --resume           go on after an interruption
  s2kernels finetune --config adapter/run.yaml --lr 1e-4 --output another
  torchrun --nproc-per-node 2 -m s2kernels finetune ...      on several GPUs
""",
    "evaluate": """\
measure an adapter beside its base

Measure an adapter, of any method, on data that it was not trained on, beside its base: the loss in
nats per token and, where records have a field "answer", how many answers are right. An answer is
right if its last number is that number or, of other answers, if it ends in that text after its last
"answer is", or is that text.

example:
  s2kernels evaluate --adapter adapter --data test.json
""",
    "generate": """\
continue prompts with several adapters

Continue prompts with the base and with several adapters of it, side by side.

example:
  s2kernels generate --model models/llama --adapter math=adapters/math \\
      --adapter code=adapters/code --prompt 'Two and two make'
""",
    "serve": """\
serve adapters over HTTP

Serve a model and any number of S2FT adapters over HTTP, as OpenAI's API does.

All adapters share one copy of the model, and one batch. "model" in a request is the name of an
adapter, or of the base. There are /v1/completions and /v1/chat/completions, both with "stream", and
/v1/models; POST /v1/adapters {"name": ..., "path": ...} loads an adapter from a folder here, DELETE
/v1/adapters/NAME unloads it.

Whoever reaches the port may use all of it; it is bound to this machine unless --host says
otherwise. Ctrl-C ends it when the answers that run are done, after 10 seconds at the latest.

example:
  s2kernels serve --model models/llama --adapter math=adapters/math
""",
    "inspect": """\
show what an adapter trains

Show what an adapter, of S2FT or SpIEL, trains, layer by layer. 'lora rank' is the rank of the LoRA
that equals the slice.

example:
  s2kernels inspect adapter --json
""",
    "merge": """\
write base and adapter as one model

Write base + adapter, of S2FT or SpIEL, as a model of its own, with the tokenizer if there is one.

example:
  s2kernels merge adapter --output merged --dtype bfloat16
""",
    "export-lora": """\
write an adapter as a LoRA that equals it

Write an adapter as the LoRA that equals it, for whatever loads LoRA.

example:
  s2kernels export-lora adapter --output lora --format vllm --check
""",
    "select": """\
rank heads and channels

Rank the heads and channels of a model, without training, by norms of the weights, of the
activations on DATA, of their product, or of the gradients on DATA. What is selected goes into
OUTPUT, a picture of all scores beside it if there is matplotlib.

example:
  s2kernels select --model models/llama --data train.json --strategy product --output selection.json
  s2kernels finetune --selection selection.json ...
""",
}
