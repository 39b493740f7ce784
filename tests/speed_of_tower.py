"""Time SO400M at 384 px on a GPU: this tower, timm's and transformers', in one run. Prints the README's tables.

python tests/speed_of_tower.py           # eager and compiled, forward and training step: 10 minutes
python tests/speed_of_tower.py --quick   # batch 64, this tower and timm's
"""

import argparse
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
    "attention": ("sdpa", "flash", "fmha", "attention"),
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


def towers() -> dict[str, nn.Module]:
    """The four towers with the same weights, in bfloat16."""
    torch.manual_seed(0)
    found = {"this tower": build("this tower")}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES[1:]:
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
    print(
        "\nrelative error of the pooled output against float64, and the attention kernel that ran"
    )
    for name, model in models.items():
        got = pooled(model, pictures).double()
        error = ((got - want).norm() / want.norm()).item()
        assert error < 0.05, f"{name}: error {error}"  # fails on NaN too
        kernels = [
            k
            for k in kernel_times(lambda m=model: pooled(m, pictures), DEVICE)
            if part_of(k) == "attention"
        ]
        print(f"{name:25} {error:.2e}  {kernels[0][:90]}")


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


def time_one(call: Callable[[], object], batch: int) -> tuple[float, float]:
    """Images a second, and the memory beyond the weights in GiB."""
    call()  # compiles
    timing = measure(call, DEVICE, repeats=10 if batch > 1 else 30, warmup=3)
    return batch / timing.median_ms * 1e3, timing.peak_bytes / 2**30


def breakdown(call: Callable[[], object]) -> dict[str, float]:
    parts = dict.fromkeys((*PARTS, "the rest"), 0.0)
    for kernel, milliseconds in kernel_times(call, DEVICE).items():
        parts[part_of(kernel)] += milliseconds
    return parts


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

    models = towers()
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(64, 3, 384, 384, generator=generator).to(DEVICE, DTYPE)
    check(models, pictures[:2])

    rows = {}
    modes = [("eager", 64), ("compiled", 64)]
    if not quick:
        modes = [(mode, batch) for mode in ("eager", "compiled") for batch in (1, 8, 64)]
    for kind, call_of in (("forward", forward_of), ("training", training_of)):
        for name, model in models.items():
            if quick and name not in NAMES[:2]:
                continue
            model.train(kind == "training")
            for mode, batch in modes:
                if kind == "training" and mode == "compiled" and (batch != 64 or "flash" in name):
                    continue  # compiling takes a minute each
                torch._dynamo.reset()
                compiled = mode == "compiled"
                graphs = "reduce-overhead" if batch == 1 and kind == "forward" else None
                run = torch.compile(model, mode=graphs) if compiled else model
                call = call_of(run, pictures[:batch])
                speed, gib = time_one(call, batch)
                rows[f"{kind} {mode} {batch}", name] = speed, gib
                share = speed * flops * (3 if kind == "training" else 1) / ceiling / 1e12
                print(
                    f"{kind:8} {mode:8} batch {batch:2} {name:25} {speed:7.1f} images/s "
                    f"{gib:6.2f} GiB {share:5.0%} of the ceiling",
                    flush=True,
                )
                if batch == 64 and name in NAMES[:2]:
                    parts = breakdown(call)
                    print(
                        "    ms:", ", ".join(f"{k} {v:.1f}" for k, v in parts.items()), flush=True
                    )
            model.zero_grad(set_to_none=True)

    print("\n| SO400M at 384 px, bf16 | " + " | ".join(NAMES) + " |\n|---|" + "---|" * len(NAMES))
    for key in dict.fromkeys(key for key, _ in rows):
        cells = [rows.get((key, name)) for name in NAMES]
        text = [f"{c[0]:.0f}, {c[1]:.2f} GiB" if c else "-" for c in cells]
        print(f"| {key} | " + " | ".join(text) + " |")
    print(json.dumps({f"{key} {name}": value for (key, name), value in rows.items()}))


if __name__ == "__main__":
    main()
