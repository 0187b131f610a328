"""The main job: one small Llama, fine-tuned by five methods side by side, and what each costs.

    python -m bench.demo [--help]

Pre-trains a byte-level Llama on the source code of Python's standard library, then fine-tunes
copies of that checkpoint on the English text of Python's language reference. In every round each
method takes one step on the same batch, and its time is compared with that of the frozen floor in
the same round. Prints a table, writes bench/results/<device>/demo.json, draws the figures, and
takes the S2FT adapters through save, load and merge.

Exits with 1 if S2FT keeps one byte more or less than `bench.demo_checks` says, or if an adapter
does not come back as it was trained.
"""

import argparse
import statistics
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from bench import corpus, memory, report, timing
from bench.demo_checks import check_adapters, check_saved
from bench.jobs import CPU, CUDA, ENTRANTS, FLOOR, S2FT, TOY, Job
from bench.training import Run, finetune, pretrain
from plots import draw_file


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    job, device = choose_job(args), torch.device(args.device)
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    # PEFT reads a property of the model that transformers is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    code = corpus.as_tokens(corpus.source_code())
    english, held_out = corpus.split(corpus.as_tokens(corpus.reference_text()), held_out=0.1)
    print(
        f"Python's standard library: pre-training on {len(code) / 1e6:.2f} MB of source code, "
        f"fine-tuning on {len(english) / 1e6:.2f} MB of English reference, "
        f"{len(held_out) / 1e6:.2f} MB of it held out"
    )
    base, pretraining = make_base(job, code, device)
    probes = corpus.even_windows(held_out, job.held_out_batches * job.batch, job.length)
    probes = list(probes.to(device).split(job.batch))
    generator = torch.Generator().manual_seed(job.budget.seed)
    batches = [
        corpus.random_batch(english, job.batch, job.length, generator).to(device)
        for _ in range(job.steps)
    ]

    runs = {entrant.name: Run(entrant, base, job) for entrant in ENTRANTS}
    rounds, curves = finetune(runs, batches, probes, job.evaluations, device)
    seconds = {name: [times[name] for times in rounds[job.untimed :]] for name in runs}
    entries = {
        name: entry(job, name, run, seconds, curves[name], count_bytes(run, probes[0]))
        for name, run in runs.items()
    }
    measure_as_run(job, runs, entries, probes[0], device)
    print_entries(job, pretraining, entries)
    exact = check_saved(job, runs, entries)
    intact = check_adapters(job, runs, entries, base, probes[0], args.adapter)

    path = args.results / report.device_name(device) / "demo.json"
    report.write_json(path, [pretraining, *entries.values()], device)
    print(f"\nwrote {path}")
    for figure in draw_file(path, args.figures):
        print(f"drew {figure}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0 if exact and intact else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: cuda where there is a GPU",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, batches and slices; default 0"
    )
    parser.add_argument(
        "--pretrain-seconds", type=float, help=f"default {CPU.pretrain_seconds:.0f}"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of fine-tuning, each method; default {CPU.steps}, on a GPU {CUDA.steps}",
    )
    parser.add_argument(
        "--toy", action="store_true", help="a job of seconds: to see that it runs, not what it says"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=report.RESULTS,
        help="folder of the JSON; default bench/results",
    )
    parser.add_argument(
        "--figures", type=Path, default=report.FIGURES, help="folder; default plots/figures"
    )
    parser.add_argument("--adapter", type=Path, help="keep the S2FT adapters in this folder")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if args.steps is not None and args.steps < 10:
        parser.error(f"--steps must be at least 10, got {args.steps}")
    if args.pretrain_seconds is not None and not args.pretrain_seconds > 0:
        parser.error(f"--pretrain-seconds must be above 0, got {args.pretrain_seconds}")
    return args


def choose_job(args: argparse.Namespace) -> Job:
    job = TOY if args.toy else CPU if args.device == "cpu" else CUDA
    if args.pretrain_seconds is not None:
        job = replace(job, pretrain_seconds=args.pretrain_seconds)
    if args.steps is not None:
        job = replace(job, steps=args.steps)
    return replace(job, budget=replace(job.budget, seed=args.seed, spiel_steps=job.steps))


def make_base(job: Job, code: Tensor, device: torch.device) -> tuple[LlamaForCausalLM, dict]:
    """The checkpoint that all methods start from, in job.dtype, and its entry in the JSON."""
    torch.manual_seed(job.budget.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=job.hidden,
        intermediate_size=job.intermediate,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        num_key_value_heads=job.kv_heads,
        max_position_embeddings=job.length,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device)
    losses, seconds = pretrain(
        model,
        code,
        seconds=job.pretrain_seconds,
        lr=job.pretrain_lr,
        batch=job.pretrain_batch,
        length=job.length,
        autocast=job.dtype,
        seed=job.budget.seed,
    )
    extra = {"losses": losses, "parameters": model.num_parameters()}
    return model.to(job.dtype), benchmark(job, "pre-training", seconds, extra)


def benchmark(job: Job, name: str, seconds: list[float], extra: dict) -> dict:
    """One entry of pytest-benchmark's JSON; `seconds` of every timed step."""
    params = asdict(job) | {"dtype": str(job.dtype).removeprefix("torch."), "tokens": job.tokens}
    return {
        "group": "demo",
        "name": name,
        "fullname": f"bench/demo.py::{name}",
        "params": params,
        "stats": timing.stats(seconds),
        "extra_info": extra,
    }


def entry(
    job: Job,
    name: str,
    run: Run,
    seconds: dict[str, list[float]],
    held_out: dict[int, float],
    sizes: dict[str, int],
) -> dict:
    """What was measured of one method."""
    return benchmark(
        job,
        name,
        seconds[name],
        {
            "lr": run.lr,
            "trained_parameters": run.method.trained_parameters(),
            "ratio_to_floor": timing.quartiles(timing.paired_ratios(seconds[name], seconds[FLOOR])),
            "bytes": sizes,
            "held_out": {"steps": list(held_out), "losses": list(held_out.values())},
            "losses": [float(loss) for loss in run.losses],
        },
    )


def count_bytes(run: Run, batch: Tensor) -> dict[str, int]:
    """What a step needs, at the end of the forward and of the backward."""
    method = run.method
    method.zero_grad()
    method.backward(method.loss(batch))
    gradients = memory.total_bytes(memory.gradients(run.model))
    kept = memory.kept_by(lambda: method.loss(batch), run.model)
    return {
        "weights": memory.total_bytes(memory.model_tensors(run.model)),
        "gradients": gradients,
        "optimizer": memory.total_bytes(method.state_tensors()),
        "saved": kept.saved,
        "unseen": kept.unseen,
    }


def print_entries(job: Job, pretraining: dict, entries: dict[str, dict]) -> None:
    parameters = pretraining["extra_info"]["parameters"]
    print(
        f"\nLlama of {parameters / 1e6:.2f} M parameters in {pretraining['params']['dtype']}: "
        f"{pretraining['stats']['rounds']} steps of pre-training, then {job.steps} steps of "
        f"{job.tokens} tokens with each method\n\n{report.methods_table(entries)}\n\n"
        f"step ms, x floor: medians of {job.steps - job.untimed} rounds; a ratio is of two steps "
        "of one round; the optimizer's part is in it\n"
        "weights to saved: MiB; saved = activations kept for the backward, whole storages\n"
        "held-out loss: nats per byte; lr: AdamW's peak, 5 % warm-up, cosine to 0\n"
        "every method is made to compute dx down to the embedding, as the floor does; as run: "
        "S2FT without that, as it is used\n"
    )
    seconds = {name: entry["stats"]["data"] for name, entry in entries.items()}
    for name in S2FT:
        ratio = statistics.median(timing.paired_ratios(seconds["lora"], seconds[name]))
        print(f"step time of lora / {name}: {ratio:.3f}")


def measure_as_run(
    job: Job,
    runs: dict[str, Run],
    entries: dict[str, dict],
    batch: Tensor,
    device: torch.device,
) -> None:
    """S2FT as a user runs it: no dx below the first trained layer, so less than the floor."""
    compared = {name: runs[name] for name in (*S2FT, FLOOR)}
    for name, run in compared.items():
        run.set_lr(0.0)  # the models stay as they were trained
        if name != FLOOR:
            run.method.stop_full_depth()
    actions = {name: (lambda _, run=run: run.step(batch)) for name, run in compared.items()}
    rounds = timing.interleave(actions, job.depth_rounds, device)
    rounds = list(tqdm(rounds, total=job.depth_rounds, desc="S2FT as run", leave=False))
    for name in S2FT:
        ratio = statistics.median(times[name] / times[FLOOR] for times in rounds)
        saved = memory.kept_by(
            lambda run=runs[name]: run.method.loss(batch), runs[name].model
        ).saved
        entries[name]["extra_info"]["as_run"] = {"ratio_to_floor": ratio, "saved": saved}


if __name__ == "__main__":
    raise SystemExit(main())
