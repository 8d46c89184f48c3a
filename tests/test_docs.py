"""The pages say what is so: snippets run, drawings are right, options, hooks and links exist."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import doc_pages
import plugin_farm
import pytest
import torch
import typer
from doc_pages import DOCS, Drawing, code, fences, sections, table
from typer.testing import CliRunner

import sparseattn as sa
from sparseattn import hookspecs
from sparseattn.cli import app
from sparseattn.testing import check_mechanism, default

PAGES = doc_pages.pages()
TEXT = {name: path.read_text() for name, path in PAGES.items()}
# Commands that this file does not run, and why.
NOT_RUN = {
    "make demo": "it installs, and measures for minutes",
    "make demo-model": "it installs, downloads, and measures for minutes",
    "make test": "it runs this file",
    **dict.fromkeys(
        (
            "sparseattn evaluate smollm2 windowed(window=60, sinks=4) --text hamlet.txt",
            "sparseattn record smollm2 --text hamlet.txt --output smollm2.safetensors "
            "--layers 2,10,23",
        ),
        "the model is what `make demo-model` downloads",
    ),
}
HOOKS_PAGE = "hooks.md"  # its commands need its plugins: `test_hook_examples_work`
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def run_commands(text: str, folder: Path) -> str:
    """Run the commands of a page in a folder; returns what they printed."""
    folder.mkdir(exist_ok=True)
    printed, before = "", Path.cwd()
    os.chdir(folder)
    try:
        for words in doc_pages.commands(text):
            if " ".join(words) not in NOT_RUN:
                assert words[0] == "sparseattn", f"run it, or say why not in NOT_RUN: {words}"
                done = CliRunner().invoke(app, words[1:])
                assert done.exit_code == 0, f"{words}: {done.output[-2000:]} {done.exception!r}"
                printed += done.stdout
    finally:
        os.chdir(before)
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def scripts(folder: Path) -> dict[str, list[str]]:
    return doc_pages.run_scripts(TEXT, folder)


@pytest.fixture(scope="module")
def commands(folder: Path) -> Any:
    return functools.lru_cache(lambda name: run_commands(TEXT[name], folder / name))


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", PAGES)
def test_snippets_and_commands_run_and_print_what_is_shown(
    name: str, scripts: dict[str, list[str]], commands: Any
) -> None:
    printed, error = scripts[name]
    assert error == ""
    printed += "" if name == HOOKS_PAGE else commands(name)
    for shown in fences(TEXT[name], "output"):
        assert squeezed(shown) in squeezed(printed)


def test_every_command_that_is_not_run_is_on_a_page() -> None:
    found = {" ".join(words) for text in TEXT.values() for words in doc_pages.commands(text)}
    assert set(NOT_RUN) <= found


def test_a_snippet_or_command_that_fails_is_seen(tmp_path: Path) -> None:
    wrong = "# Title\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"
    lone = "```python\nx\n```\n"  # no name of one page is in reach of another
    found = doc_pages.run_scripts(
        {"a.md": wrong, "b.md": lone, "c.md": "```python\nprint(3)\n```\n"}, tmp_path
    )
    assert 'File "a.md", line 8' in found["a.md"][1]
    assert "NameError" in found["b.md"][1]
    assert found["c.md"] == ["3\n", ""]
    with pytest.raises(AssertionError, match="no mechanism is named"):
        run_commands("```sh\nsparseattn show nonsense\n```\n", tmp_path)
    with pytest.raises(AssertionError, match="NOT_RUN"):
        run_commands("```sh\ncurl example.org\n```\n", tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name: str) -> None:
    assert doc_pages.broken_links(TEXT[name], PAGES[name]) == []


def test_a_broken_link_is_seen() -> None:
    page = DOCS / "index.md"
    text = "[a](concepts.md) [b](nowhere.md) [c](concepts.md#engines) [d](concepts.md#engine)"
    assert doc_pages.broken_links(text, page) == ["nowhere.md", "concepts.md#engine"]


@pytest.mark.parametrize("start", ["README.md", "index.md"])
def test_every_page_is_linked(start: str) -> None:
    linked = {Path(target).name for target in re.findall(r"\]\(([^)#\s]+)", TEXT[start])}
    assert linked >= {name for name in PAGES if name not in ("README.md", "index.md")}


@pytest.mark.parametrize("name", PAGES)
def test_names_and_commands_on_the_page_exist(name: str) -> None:
    assert [word for word in re.findall(r"\bsa\.(\w+)", TEXT[name]) if not hasattr(sa, word)] == []
    said = re.findall(r"`sparseattn ([a-z]+)", doc_pages.prose(TEXT[name]))
    assert set(said) <= set(COMMANDS)


@pytest.mark.parametrize("options", [{"block": 4}, {"block": 16, "top": 1}])
def test_the_selecting_example_keeps_the_laws(options: dict[str, int], tmp_path: Path) -> None:
    [snippet] = [x for x in fences(TEXT["plugins.md"], "python") if "class FirstKeyBlocks" in x]
    imports = "from dataclasses import dataclass\nimport torch\nimport sparseattn as sa\n"
    path = tmp_path / "first_key_blocks.py"
    path.write_text(imports + snippet[: snippet.index("\n\n\n")])
    check_mechanism(runpy.run_path(str(path))["FirstKeyBlocks"](**options))


DRAWINGS = [
    pytest.param(text, id=f"{name}-{text.splitlines()[0]}")
    for name in PAGES
    for text in fences(TEXT[name], "mask")
]


@pytest.mark.parametrize("text", DRAWINGS)
def test_drawing_is_the_mask(text: str) -> None:
    assert Drawing.parse(text).problems() == []


def test_semantics_draws_each_kind_of_call() -> None:
    drawn = [Drawing.parse(text) for text in fences(TEXT["semantics.md"], "mask")]
    words = {word for one in drawn for word in one.call}
    assert words == {"causal", "q_offset", "key_mask", "q_segments", "kv_segments"}
    unequal = [one for one in drawn if one.n != one.m]
    assert {one.spec.partition("(")[0] for one in unequal} >= {"full", "windowed"}
    assert any(one.n > one.m for one in unequal) and any(one.n < one.m for one in unequal)


def test_a_wrong_drawing_is_seen() -> None:
    right = fences(TEXT["semantics.md"], "mask")[0]
    head, first, *rest = right.splitlines()
    flipped = "\n".join([head, first[:-1] + str(1 - int(first[-1])), *rest])
    assert len(Drawing.parse(flipped).problems()) == 3
    assert Drawing.parse(f"{head}\n{first}").problems()
    assert Drawing.parse(right.replace("causal=True", "causal=False")).problems()


def mechanism_problems(text: str) -> list[str]:
    """What the page on mechanisms leaves out or has wrong."""
    found, parts = [], sections(text)
    records = {r.name: r for r in sa.list_mechanisms() if r.provider == "sparseattn"}
    extra = set(parts) - set(records) - {"Which to take", "What each call needs"}
    found += [f"{name} is no mechanism" for name in sorted(extra)]
    for name, record in records.items():
        part = parts.get(name, "")
        options = {
            word: "must be given" if option.required else f"`{option.default!r}`"
            for word, option in record.options.items()
        }
        rows = table(part, "option", "default", "meaning")
        if {code(row[0])[0]: row[1] for row in rows} != options or not all(r[2] for r in rows):
            found.append(f"{name}: options {options}, the page has {rows}")
        if ("No options" in part) != (not options):
            found.append(f"{name}: whether it has options")
        wanted = [
            f"Nature `{record.nature}`",
            "Cost: ",
            *re.findall(r"arXiv:[\d.]+\d", record.source),
        ]
        wanted += ["looks ahead"] if record.looks_ahead else []
        found += [f"{name}: it does not say {word!r}" for word in wanted if word not in part]
        mech = default(name)
        drawn = [Drawing.parse(mask).spec for mask in fences(part, "mask")]
        static = isinstance(mech, sa.MaskedSoftmax) and not mech.is_dynamic
        if static and options and not any(option.required for option in record.options.values()):
            found += [] if drawn else [f"{name}: no drawing"]
        found += [f"{name}: a drawing of {spec}" for spec in drawn if not spec.startswith(name)]
    return found


def test_every_mechanism_and_option_is_described() -> None:
    assert mechanism_problems(TEXT["mechanisms.md"]) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `sinks` | `0` |", "| `sink` | `0` |"),
        ("| `sinks` | `0` |", "| `sinks` | `4` |"),
        ("| `seed` | `0` | of the draws, 0 to 2**64 - 1 |\n", ""),
        ("## taylor", "## tailor"),
        ("Nature `softmax_estimate`", "Nature `exact`"),
        ("[arXiv:2407.02490]", "[arXiv]"),
    ],
)
def test_a_wrong_description_is_seen(old: str, new: str) -> None:
    text = TEXT["mechanisms.md"]
    assert old in text
    assert mechanism_problems(text.replace(old, new)) != []


def questions() -> dict[str, sa.AttentionCall]:
    """A call for each column of the table of what is refused."""
    q = torch.zeros(1, 2, 4, 8)
    extra: dict[str, dict[str, Any]] = {
        "not causal": {"causal": False},
        "`scale`": {"scale": 0.5},
        "`softcap`": {"softcap": 30.0},
        "`sink_logits`": {"sink_logits": torch.zeros(2)},
        "`bias`": {"bias": torch.zeros(1, 1, 1, 4)},
        "`return_lse`": {"needs_lse": True},
        "gradients": {},
    }
    made = {
        word: sa.AttentionCall.make(q, q, q, **{"causal": True, **given})
        for word, given in extra.items()
    }
    made["gradients"] = made["gradients"].replace(needs_grad=True)
    return made


def test_the_table_of_refusals_is_right() -> None:
    asked = questions()
    rows = table(TEXT["mechanisms.md"], "mechanism", *asked)
    shown = {code(name)[0]: cells for name, *cells in rows}
    names = [r.name for r in sa.list_mechanisms() if r.provider == "sparseattn"]
    assert shown == {
        name: ["refused" if default(name).refusals(call) else "yes" for call in asked.values()]
        for name in names
    }


def cli_problems(text: str) -> list[str]:
    """Commands, arguments and options that the page and the program do not share."""
    parts = {h.removeprefix("sparseattn "): t for h, t in sections(text).items()}
    found = [f"commands {sorted(parts)}"] if set(parts) != set(COMMANDS) else []
    for name, command in COMMANDS.items():
        rows = table(parts.get(name, ""), "argument or option", "meaning")
        rows += table(parts.get(name, ""), "option", "meaning")
        shown = {word: row[1] for row in rows for word in code(row[0])}
        real = {}
        for param in command.params:
            default_of = param.default
            for word in [*param.opts, *param.secondary_opts]:
                if param.param_type_name == "argument":
                    word = param.metavar.strip("[]{}").replace("]...", " ...")
                elif param.metavar is not None:
                    word += f" {param.metavar}"
                real[word] = "" if default_of in (None, True, False) else str(default_of)
        if set(shown) != set(real):
            found.append(f"{name}: {sorted(real)}, the page has {sorted(shown)}")
        for word in set(shown) & set(real):
            if real[word] not in shown[word]:
                found.append(f"{name} {word}: its default {real[word]}")
    return found


def test_every_command_and_option_is_described() -> None:
    assert cli_problems(TEXT["cli.md"]) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## sparseattn doctor", "## sparseattn nurse"),
        ("| `--seed N` |", "| `--seeds N` |"),
        ("interleaved; 7 by default", "interleaved; 9 by default"),
        ("| `--expensive` | also the laws that compile |\n", ""),
        ("| `--length N` | may repeat", "| `--length` | may repeat"),
    ],
)
def test_a_wrong_option_is_seen(old: str, new: str) -> None:
    assert old in TEXT["cli.md"]
    assert cli_problems(TEXT["cli.md"].replace(old, new)) != []


def test_json_fields_are_described(folder: Path, scripts: Any, commands: Any) -> None:
    commands("cli.md")
    commands("models.md")  # with the model that the page's own script saves
    parts = {h.removeprefix("sparseattn "): t for h, t in sections(TEXT["cli.md"]).items()}
    fields = {
        name: {word: row[1] for row in table(part, "field", "meaning") for word in code(row[0])}
        for name, part in parts.items()
    }
    written = {
        path.stem: json.loads(path.read_text())
        for page in ("cli.md", "models.md")
        for path in (folder / page).glob("*.json")
    }
    row = written["backward"]["rows"][0]
    found = {
        "list": set(written["mechanisms"][0]),
        "show": {*written["bigbird"], *written["map"]} - set(fields["list"]),
        "compare": set(row),
        "bench": set(written["growth"]["growth"][0]),
        "evaluate": set(written["evaluation"]["rows"][0]),
        "record": set(written["recorded"]),
        "report": set(written["reported"][0]),
        "check": set(written["laws"][0]),
        "doctor": {word for record in written["doctor"] for word in record},
        "new": set(written["made"]),
    }
    assert {name: set(words) for name, words in fields.items()} == found
    inner = {word: set(row[word]) for word in ("error", "retained_mass", "arithmetic", "time")}
    inner["backward"] = set(row["backward"])
    for word, keys in inner.items():
        assert {x for x in code(fields["compare"][word]) if not x.startswith("--")} == keys


def hook_problems(text: str) -> list[str]:
    """Hooks that the page lacks, or shows with another signature."""
    specs = {
        name: hook
        for name, hook in vars(hookspecs).items()
        if hasattr(hook, f"{hookspecs.PROJECT}_spec")
    }
    parts = sections(text)
    signatures = {name: inspect.signature(hook) for name, hook in specs.items()}
    headings = {f"{name}({', '.join(sig.parameters)})": name for name, sig in signatures.items()}
    found = [f"sections {list(parts)}"] if set(parts) != set(headings) else []
    for heading, name in headings.items():
        part = parts.get(heading, "")
        exact = f"{name}{signatures[name]}".replace("'", "")
        if [squeezed(shown) for shown in fences(part, "text")] != [exact]:
            found.append(f"{name}: its signature is {exact}")
        said = code(inspect.getdoc(specs[name]) or "")
        found += [f"{name}: {word}" for word in said if word not in part]
        found += [] if fences(part, "python") else [f"{name}: no example"]
    return found


def test_every_hook_is_described_with_its_signature() -> None:
    assert hook_problems(TEXT[HOOKS_PAGE]) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## register_metrics(register)", "## register_metrics(add)"),
        ("register: Callable[[type], None]", "register: Callable[[Any], None]"),
        ("fn(length, seed, causal)", "fn(length, seed)"),
    ],
)
def test_a_wrong_hook_is_seen(old: str, new: str) -> None:
    assert old in TEXT[HOOKS_PAGE]
    assert hook_problems(TEXT[HOOKS_PAGE].replace(old, new)) != []


def test_hook_examples_work(tmp_path: Path) -> None:
    for heading, part in sections(TEXT[HOOKS_PAGE]).items():
        (source,) = fences(part, "python")
        plugin_farm.install(tmp_path, heading.partition("(")[0], source)
    asked = [words[1:] for words in doc_pages.commands(TEXT[HOOKS_PAGE])]
    found = plugin_farm.answers(
        tmp_path,
        f"""
        import json
        from typer.testing import CliRunner
        from sparseattn import registry
        from sparseattn.cli import app

        for words in {asked!r}:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (words, done.output, done.exception)
        held = {{r.name: [*r.mechanisms, *r.implementations, *r.inputs, *r.metrics]
                for r in registry.diagnose() if not r.built_in}}
        print(json.dumps(held))
        """,
        OMP_NUM_THREADS="1",
    )
    assert found == {
        "register_mechanisms": ["alternate"],
        "register_implementations": ["full:wide"],
        "register_inputs": ["ramp"],
        "register_metrics": ["mean_bias"],
    }
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert all(isinstance(row["metrics"]["mean_bias"], float) for row in rows)
