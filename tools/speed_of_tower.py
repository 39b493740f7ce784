"""Time SO400M at 384 px on a GPU: this tower, timm's and transformers', in one run. Prints the README's tables.

python tools/speed_of_tower.py           # eager and compiled, forward and training step: a quarter of an hour
python tools/speed_of_tower.py --quick   # batch 64, this tower and timm's: 4 minutes
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from siglip_lib import (
    create_siglip_vit,
    device_report,
    import_timm,
    kernel_times,
    measure,
    save_weights,
)

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
NAMES = ("this tower", "timm", "transformers, SDPA", "transformers, flash-attn")
PARTS = {  # where the time goes: words in the names of kernels
    "attention": (
        "sdpa",
        "flash",
        "fmha",
        "attention",
        "_forward_kernel",
        "_hopper_kernel",
        "_redo_kernel",
        "_backward_kernel",
        "_delta_kernel",
        "_queries_kernel",
        "_keys_kernel",
    ),
    "matrix products": ("nvjet", "gemm", "cutlass", "conv", "splitK"),
    "norms": ("layer_norm", "layernorm"),
    "GELU": ("gelu", "Gelu"),
    "additions and copies": ("elementwise", "add", "copy", "Memcpy", "poi_fused"),
}


def build(name: str) -> nn.Module:
    """A tower on the GPU in float32 with its own random weights; those of timm and transformers are overwritten."""
    with DEVICE:
        if name == "this tower":
            return create_siglip_vit()
        if name == "timm":
            timm = import_timm()
            kind = "vit_so400m_patch14_siglip_384"
            return timm.create_model(kind, num_classes=0, act_layer="gelu_tanh")
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        )
        config._attn_implementation = "flash_attention_2" if "flash" in name else "sdpa"
        return SiglipVisionModel(config)


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.pooler_output


def towers(names: tuple[str, ...]) -> dict[str, nn.Module]:
    """This tower and others with the same weights, in bfloat16."""
    torch.manual_seed(0)
    found = {"this tower": build("this tower")}
    with tempfile.TemporaryDirectory() as folder:
        for name in names[1:]:
            layout = "timm" if name == "timm" else "transformers"
            path = Path(folder) / f"{layout}.safetensors"
            if not path.exists():
                save_weights(found["this tower"], path, layout)
            found[name] = build(name)
            found[name].load_state_dict(load_file(path))
    return {name: model.to(DTYPE).eval() for name, model in found.items()}


@torch.no_grad()
def check(models: dict[str, nn.Module], pictures: Tensor) -> None:
    """Each tower's distance from float64, before anything is timed."""
    exact = create_siglip_vit(backend="eager").to(DEVICE, torch.float64).eval()
    exact.load_state_dict(models["this tower"].state_dict())
    want = exact(pictures.double())
    print("\nrelative error of the pooled output against float64")
    for name, model in models.items():
        got = pooled(model, pictures).double()
        error = ((got - want).norm() / want.norm()).item()
        assert error < 0.05, f"{name}: error {error}"  # fails on NaN too
        print(f"{name:25} {error:.2e}")


def part_of(kernel: str) -> str:
    return next(
        (part for part, words in PARTS.items() if any(w in kernel for w in words)), "the rest"
    )


def forward_of(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return pooled(model, x)

    return call


def training_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        model.zero_grad(set_to_none=True)
        pooled(model, x).float().square().mean().backward()

    return call


MODES = ("eager", "compiled")
KINDS = {"forward": forward_of, "training step": training_of}


def time_one(call: Callable[[], object], batch: int) -> tuple[float, float]:
    """Images a second, and the memory beyond the weights in GiB."""
    call()  # compiles
    timing = measure(call, DEVICE, repeats=10 if batch > 1 else 30, warmup=3)
    return batch / timing.median_ms * 1e3, timing.peak_bytes / 2**30


def profile(call: Callable[[], object]) -> str:
    """Milliseconds by kind of kernel, and the eight kernels that took longest."""
    kernels = kernel_times(call, DEVICE)
    parts = dict.fromkeys((*PARTS, "the rest"), 0.0)
    for kernel, milliseconds in kernels.items():
        parts[part_of(kernel)] += milliseconds
    times = ", ".join(f"{part} {milliseconds:.1f}" for part, milliseconds in parts.items())
    longest = [f"\n    {ms:6.1f} ms {kernel[:90]}" for kernel, ms in list(kernels.items())[:8]]
    return f"{times} ms" + "".join(longest)


def build_seconds(name: str) -> float:
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        build(name)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    names = NAMES[:2] if quick else NAMES
    print(device_report(DEVICE))
    a, b = torch.randn(2, 8192, 8192, device=DEVICE).to(DTYPE)
    ceiling = 2 * 8192**3 / measure(lambda: a @ b, DEVICE).median_ms / 1e9
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_siglip_vit(backend="eager")(torch.empty(1, 3, 384, 384))
    flops = counter.get_total_flops()
    print(
        f"ceiling: {ceiling:.0f} TFLOP/s (bf16 matrix product of 8192); a picture: {flops / 1e9:.1f} GFLOP"
    )
    for name in ("timm", "this tower"):
        print(f"building and initialising {name} on the GPU: {build_seconds(name):.2f} s")

    # two of the four share their code, each with six shapes to compile: past its limit torch would run them eagerly
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    models = towers(names)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(64, 3, 384, 384, generator=generator).to(DEVICE, DTYPE)
    check(models, pictures[:2])

    rows, calls = {}, {}
    for mode, kind, name in itertools.product(MODES, KINDS, names):
        model = models[name].train(kind == "training step")
        for batch in (64,) if quick else (1, 8, 64):
            run = model
            if mode == "compiled":
                graphs = "reduce-overhead" if (kind, batch) == ("forward", 1) else None
                run = torch.compile(model, mode=graphs, dynamic=False)
            call = KINDS[kind](run, pictures[:batch])
            speed, gib = time_one(call, batch)
            rows[f"{kind}, {mode}, {batch}", name] = speed, gib
            calls[f"{kind}, {mode}", name] = call
            share = speed * flops * (1 if kind == "forward" else 3) / ceiling / 1e12
            print(
                f"{kind:13} {mode:8} batch {batch:2} {name:25} {speed:7.1f} images/s "
                f"{gib:6.2f} GiB {share:5.0%} of the ceiling",
                flush=True,
            )
        model.zero_grad(set_to_none=True)

    # last, as launches stay slower once a profiler has watched them
    print("\nwhere the time goes, batch 64")
    for (what, name), call in calls.items():
        models[name].train(what.startswith("training"))
        print(f"{what}, {name}: {profile(call)}", flush=True)
        models[name].zero_grad(set_to_none=True)

    print("\n| SO400M at 384 px, bf16 | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for key in dict.fromkeys(key for key, _ in rows):
        cells = [rows.get((key, name)) for name in names]
        text = [f"{c[0]:.0f}, {c[1]:.2f} GiB" if c else "-" for c in cells]
        print(f"| {key} | " + " | ".join(text) + " |")
    print(json.dumps({f"{key} {name}": value for (key, name), value in rows.items()}))


if __name__ == "__main__":
    main()
