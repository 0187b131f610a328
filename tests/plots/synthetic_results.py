"""Results files with made-up numbers, of every kind that the figures must cope with."""

METHODS = (
    *("frozen", "full", "lora", "lora_fp32", "lora_fused", "dora", "galore", "lisa", "loreft"),
    *("shira", "spiel", "spiel_ma", "s2ft_inplace", "s2ft_additive"),
    *("s2ft_permuted_inplace", "s2ft_permuted_additive", "s2ft_unfused"),
)
CORE = ("frozen", "full", "lora", "lora_fused", "s2ft_inplace", "s2ft_additive")
SLOWNESS = dict(
    zip(
        METHODS,
        (
            1,
            1.6,
            1.15,
            1.3,
            1.08,
            1.7,
            2.4,
            1.1,
            1.2,
            1.25,
            1.4,
            1.35,
            1.01,
            1.03,
            1.02,
            1.04,
            1.05,
        ),
        strict=True,
    )
)
PARAMETERS = {"small": 25_000_000, "wide-1b": 1_100_048_384}
PARAMETERS |= {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320}
LAYERS = {"small": 8, "wide-1b": 22, "llama-2-7b": 32, "llama-2-13b": 40}
WIDE = {"shape": "wide-1b", "layers": 2, "vocab": 2880}
VOCAB = 32_000
PLAIN = {
    **{"checkpointing": False, "liger": False, "attention": "sdpa"},
    **{"compile": False, "full_depth": False},
}
VERSIONS = {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.0", "peft": "0.20"}
CPU = {"cpu": {"brand_raw": "Testing CPU", "count": 2}, "gpu": None, **VERSIONS}
GPU = {**CPU, "gpu": "Testing GPU 9000"}
CEILINGS = {
    "gemm_flops": {"float32": 1e11, "bfloat16": 8e14},
    "copy_bytes_per_second": 1e10,
}


def document(benchmarks: list[dict], machine: dict = CPU) -> dict:
    return {"machine_info": machine, "benchmarks": benchmarks}


def step(
    suite: str,
    method: str,
    *,
    shape: str = "small",
    layers: int | None = None,
    vocab: int = VOCAB,
    batch: int = 1,
    length: int = 128,
    dtype: str = "float32",
    share: float | None = None,
    status: str = "measured",
    slowed: float = 1.0,
    **options,
) -> dict:
    """One entry of steps.json.

    slowed: how much longer all of its rounds took, those of its floor as well.
    """
    depth = LAYERS[shape]
    layers = layers or depth
    tokens, total = batch * length, PARAMETERS[shape] * layers // depth
    speed = 6e-15 if dtype == "bfloat16" else 2e-12
    trained = {"frozen": 0, "full": total}.get(method, int(total * (share or 0.008)))
    floor = speed * total * tokens + 1e-4 * layers
    floor *= 1.3 if options.get("checkpointing") else 1
    ratio = SLOWNESS[method] * (1 + 3 * (share or 0)) + (options.get("checkpointing") or 0) / 20
    ratio = 1.0 if method == "frozen" else ratio
    seconds = ratio * floor
    weights, saved = (
        (2 if dtype == "bfloat16" else 4) * total,
        int(tokens * layers * 40_000 * SLOWNESS[method]),
    )
    saved = saved // 5 if options.get("checkpointing") else saved
    held = max(saved, 4 * trained)
    peak = weights + 8 * trained + held + total // 9
    measured = {
        "trained_parameters": trained,
        "bytes": {
            **{"weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained},
            **{"saved": saved, "unseen": 0, "temporaries": total // 9},
            **{"peak": peak, "first_step_peak": peak - 8 * trained},
        },
        "ratio_to_floor": {"median": ratio, "q1": ratio - 0.01, "q3": ratio + 0.02},
        "floor_seconds": {"median": slowed * floor},
        "paired": True,
    }
    size = f"{shape}:{layers},{vocab}/{batch}x{length}/{dtype}"
    of_floor = {name: on for name, on in options.items() if name != "full_depth"}
    stats = {"median": slowed * seconds}
    ran = status == "measured"
    return {
        "group": size,
        "name": f"{size}/{method}/{share}/{options}",
        "params": {
            **{"suites": [suite], "floor": f"{size}/frozen/{of_floor}"},
            **{"shape": shape, "layers": layers, "of_layers": depth},
            **{"vocab": vocab, "of_vocab": VOCAB, "batch": batch, "length": length},
            **{"tokens": tokens, "dtype": dtype, "method": method},
            **{"options": {**PLAIN, **options}, "share": share},
        },
        "stats": stats if ran else None,
        "extra_info": {
            **{"status": status, "total_parameters": total},
            **(measured if ran else {}),
        },
    }


def cpu_steps() -> dict:
    """All suites of a machine without a GPU; GaLore is not available there."""
    missing = {"galore": "unavailable: galore_torch is not installed"}
    benchmarks = [
        *(
            step("figure5", name, batch=batch, status=missing.get(name, "measured"))
            for batch in (1, 2)
            for name in METHODS
        ),
        *(step("figure5", name, **WIDE) for name in CORE),
        *(step("depth", name, **WIDE, full_depth=on) for name in CORE[2:] for on in (False, True)),
        *(step("tokens", name, length=length) for length in (64, 256, 512) for name in CORE),
        *(step("depth", name, full_depth=on) for name in CORE[1:] for on in (False, True)),
        step("share", "frozen"),
        *(
            step("share", name, share=share)
            for name in ("lora", "s2ft_inplace")
            for share in (0.001, 0.01, 0.1)
        ),
        *(step("density", name, length=16) for name in ("frozen", "full")),
        *(step("density", "spiel", length=16, share=share) for share in (0.001, 0.01, 0.1, 0.5)),
        *(
            step("checkpointing", name, batch=2, checkpointing=on)
            for name in CORE
            for on in (False, True)
        ),
        *(
            step("extrapolation", name, layers=layers)
            for layers in (1, 2, 8)
            for name in ("frozen", "full", "s2ft_inplace")
        ),
    ]
    return document(benchmarks)


def gpu_steps() -> dict:
    """Two of the paper's models: full fine-tuning does not fit, dora does not fit everywhere."""

    def status(shape: str, batch: int, length: int, name: str) -> str:
        large = shape == "llama-2-13b"
        oom = large and (name == "full" or (name == "dora" and batch * length > 1024))
        return "out of memory" if oom else "measured"

    benchmarks = [
        step(
            *(suite, name),
            **{"shape": shape, "batch": batch, "length": length, "dtype": "bfloat16"},
            status=status(shape, batch, length, name),
        )
        for suite, sizes in (
            ("figure5", [(1, 512), (1, 1024), (2, 1024)]),
            ("tokens", [(1, 256), (1, 512), (1, 1024), (2, 1024), (4, 2048)]),
        )
        for shape in ("llama-2-7b", "llama-2-13b")
        for batch, length in sizes
        for name in METHODS
    ]
    return document(benchmarks, GPU)


def ops(machine: dict, shapes: list[str], impls: list[str]) -> dict:
    """ops.json: a copy-bound and a GEMM-bound op."""
    dtype = "torch.bfloat16" if machine["gpu"] else "torch.float32"
    flops_per_second = CEILINGS["gemm_flops"][dtype.removeprefix("torch.")]
    benchmarks = [
        {
            "group": f"{op} {shape}",
            "params": {"impl": impl},
            "stats": {"median": 0.01 / share},
            "extra_info": {"bytes": size, "flops": flops, "dtype": dtype},
        }
        for shape in shapes
        for op, size, flops in (
            ("linear", 1000, int(0.01 * flops_per_second)),
            ("swiglu", 100_000_000, 1000),
        )
        for impl, share in zip(impls, (0.5, 0.8), strict=False)
    ]
    return document(benchmarks, {**machine, "ceilings": CEILINGS})


def host() -> dict:
    """host.json: two methods and the floor, in another order than that of the figures."""
    benchmarks = [
        {
            "params": {"method": method},
            "extra_info": {
                "seconds": {"median": ratio * 7e-4},
                "ratio": {"median": ratio, "q1": ratio - 0.02, "q3": ratio + 0.03},
            },
        }
        for method, ratio in (("s2ft_inplace", 1.54), ("lora", 1.91), ("frozen", 1.01))
    ]
    return document(benchmarks)
