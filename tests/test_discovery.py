"""Discovery with real distributions, hostile ones among them, in processes of their own."""

from __future__ import annotations

import json

import pytest
from plugin_farm import answers, install, python

# Each stands alone in a distribution of its own. What becomes of them all is asked once.
FARM = {
    "good": """
        class Plugin:
            sparseattn_api = 1
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("good_one"))
                register(make("good_two"))
    """,
    "exits": "raise SystemExit(3)",
    "raises": "raise RuntimeError('at import')",
    "mute": """
        class Mute(Exception):
            def __str__(self):
                raise SystemExit(1)
        raise Mute
    """,
    "prints": """
        print("printed at import")
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                print("printed in a hook")
                register(make("printed"))
    """,
    "half": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("half_one"))
                register(make("half_two"))
                raise ValueError("half-way")
    """,
    "late_half": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("late_half_one"))
            @sa.hookimpl
            def register_metrics(self, register):
                raise SystemExit
    """,
    "swallows": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("swallowed"))
                try:
                    register(dataclass(make("thawed", __hash__=None)))
                except Exception:
                    pass
    """,
    "unfrozen": """
        @dataclass
        class Unfrozen(sa.MaskedSoftmax):
            name = "unfrozen"
            def visible(self, i, j):
                return i == j
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(Unfrozen)
    """,
    "endless": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("x" * 100_000))
    """,
    "future": """
        class Plugin:
            sparseattn_api = 2
            def __init__(self):
                raise RuntimeError("made for another version, so never to be made")
    """,
    "future_instance": """
        class Plugin:
            def __init__(self):
                self.sparseattn_api = 2
    """,
    "truthy": """
        class Plugin:
            sparseattn_api = True
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("truthy"))
    """,
    "garbage": "Plugin = 42",
    "nothing": "Plugin = None",
    "needy": """
        class Plugin:
            def __init__(self, needed):
                pass
    """,
    "unmarked": """
        class Plugin:
            def register_mechanisms(self, register):
                register(make("unmarked"))
    """,
    "misspelt": """
        class Plugin:
            @sa.hookimpl
            def register_mechanism(self, register):
                register(make("misspelt"))
    """,
    "misdeclared": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, registry):
                registry(make("misdeclared"))
    """,
    "asynchronous": """
        class Plugin:
            @sa.hookimpl
            async def register_mechanisms(self, register):
                register(make("asynchronous"))
    """,
    "returns": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                return [make("returned")]
    """,
    "hostile_name": """
        class Meta(type(sa.MaskedSoftmax)):
            @property
            def name(cls):
                raise SystemExit
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                class Bad(sa.MaskedSoftmax, metaclass=Meta):
                    pass
                register(dataclass(frozen=True)(Bad))
    """,
    "twice": """
        One = make("twice")
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(One)
                register(One)
    """,
    "impostor": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("full"))
                register(make("impostor_own"))
    """,
    "twin_a": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("twin"))
                register(make("twin_a_own"))
    """,
    "twin_b": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("twin"))
    """,
    "reentrant": """
        assert sa.mechanism("full").name == "full"
        SEEN = [r.name for r in sa.list_mechanisms()]
        @sa.register_mechanism
        @dataclass(frozen=True)
        class Reentrant(sa.MaskedSoftmax):
            name = "reentrant"
            def visible(self, i, j):
                return i == j
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("reentrant_two"))
    """,
    "reentrant_fails": """
        sa.register_mechanism(make("reentrant_fails"))
        raise RuntimeError
    """,
    "late": """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                Plugin.register = register
    """,
    "faster": """
        class Fast(sa.Implementation):
            def __init__(self, name):
                self.name = name
            def run(self, mechanism, q, k, v, call):
                return sa.attention(q, k, v, mechanism, causal=call.causal, impl="torch"), None
        class Plugin:
            @sa.hookimpl
            def register_implementations(self, register):
                register("windowed", Fast("fast"))
                register("windowed", Fast("shared"))
                register("block_sparse", Fast("fast"))
                register("windoed", Fast("fast"))
    """,
    "usurper": """
        from farm_faster import Fast
        class Plugin:
            @sa.hookimpl
            def register_implementations(self, register):
                register("windowed", Fast("torch"))
                register("block_sparse", Fast("torch"))
                register("windowed", Fast("shared"))
                register("full", Fast("swift"))
    """,
    "reserved": """
        from farm_faster import Fast
        class Plugin:
            @sa.hookimpl
            def register_implementations(self, register):
                register("windowed", Fast("reference"))
    """,
    "uncalled": """
        from farm_faster import Fast
        class Plugin:
            @sa.hookimpl
            def register_implementations(self, register):
                register("windowed", Fast)
    """,
    "measures": """
        import torch
        def ramp(length, seed, causal):
            q, k, v = torch.randn(3, 1, 1, length, 4)
            return q, k, v
        class Plugin:
            @sa.hookimpl
            def register_inputs(self, register):
                register("ramp", ramp)
            @sa.hookimpl
            def register_metrics(self, register):
                register("bias_of_mean", lambda out, ref, call: float((out - ref).mean()))
    """,
    "mismeasures": """
        class Plugin:
            @sa.hookimpl
            def register_inputs(self, register):
                register("needle", lambda length, seed, causal: None)
    """,
    "short_metric": """
        class Plugin:
            @sa.hookimpl
            def register_metrics(self, register):
                register("short", lambda out, ref: 0.0)
    """,
    "interrupts": "raise KeyboardInterrupt",
}
VALUES = {
    "lost": "farm_no_such_module:Plugin",
    "pointless": "farm_good:NoSuchPlugin",
    "malformed": "!not a reference!",
    "module": "farm_module",
    "instance": "farm_instance:plugin",
}
MORE = {
    "lost": "",
    "pointless": "",
    "malformed": "",
    "module": """
        @sa.hookimpl
        def register_mechanisms(register):
            register(make("from_module"))
    """,
    "instance": """
        class Plugin:
            def __init__(self, name):
                self.name = name
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make(self.name))
        plugin = Plugin("from_instance")
    """,
}

ASK = """
    import dataclasses, json, sys
    import sparseattn as sa
    from sparseattn import registry
    print("heard", file=sys.stderr)
    records = {r.name: dataclasses.asdict(r) for r in registry.diagnose()}
    names = [r.name for r in sa.list_mechanisms()]
    providers = {r.name: r.provider for r in sa.list_mechanisms()}
    def failing(call):
        try:
            return repr(call())
        except sa.SparseAttnError as error:
            return [type(error).__name__, str(error), error.reasons]
    import farm_late, farm_reentrant
    print(json.dumps({
        "records": records,
        "names": names,
        "providers": providers,
        "full": type(sa.mechanism("full")).__module__,
        "twin": failing(lambda: sa.mechanism("twin")),
        "half_one": failing(lambda: sa.mechanism("half_one")),
        "unfrozn": failing(lambda: sa.mechanism("unfrozn")),
        "good": failing(lambda: sa.mechanism("good_one")),
        "late": failing(lambda: farm_late.Plugin.register(farm_late.make("late"))),
        "seen_while_loading": farm_reentrant.SEEN,
        "extra": {n: [i.name for i in registry.extra_implementations(n)]
                  for n in ("windowed", "block_sparse", "full", "dilated")},
        "inputs": list(registry.inputs()),
        "metrics": list(registry.metrics()),
        "again": [r.name for r in registry.diagnose()] == list(records),
        "after_reset": [r.name for r in (registry.reset(), sa.list_mechanisms())[1]],
    }))
"""


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    where = tmp_path_factory.mktemp("farm")
    for name, source in {**FARM, **MORE}.items():
        install(where, name, source, VALUES.get(name))
    install(
        where,
        "anonymous",
        """
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("anonymous"))
        """,
        metadata=False,
    )
    return where


@pytest.fixture(scope="module")
def found(farm):
    done = python(farm, ASK, SPARSEATTN_PLUGINS="-interrupts")
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout), "stderr": done.stderr}


BUILT_IN = {"full", "windowed", "block_sparse", "linear", "flex", "flash_attn", "fla"}


def test_good_plugins_load_beside_every_broken_one(found):
    loaded = {name for name, r in found["records"].items() if r["status"] == "loaded"}
    assert loaded == BUILT_IN | {
        *("good", "prints", "module", "instance", "anonymous", "reentrant", "late", "measures")
    }
    good = found["records"]["good"]
    assert (good["distribution"], good["version"], good["reason"]) == ("good-dist", "1.2", "")
    assert good["mechanisms"] == ["good_one", "good_two"]
    assert found["providers"]["good_one"] == "good-dist"
    assert found["providers"]["full"] == "sparseattn"
    assert found["good"] == "good_one"
    assert {"printed", "from_module", "from_instance", "anonymous"} <= set(found["names"])
    assert found["names"] == sorted(found["names"])
    assert found["again"]
    # All but what a module registers by being imported, which happens once.
    assert set(found["names"]) - set(found["after_reset"]) == {"reentrant"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", ["SystemExit", "3"]),
        ("raises", ["RuntimeError", "at import"]),
        ("mute", ["Mute"]),
        ("half", ["ValueError", "half-way"]),
        ("late_half", ["SystemExit"]),
        ("swallows", ["Thawed", "frozen"]),
        ("unfrozen", ["Unfrozen", "@dataclass(frozen=True)"]),
        ("endless", ["name", "[a-z][a-z0-9_]{0,63}"]),
        ("future", ["version 2", "version 1"]),
        ("future_instance", ["version 2"]),
        ("truthy", ["version True"]),
        ("garbage", ["42", "hookimpl"]),
        ("nothing", ["None", "hookimpl"]),
        ("needy", ["TypeError", "needed"]),
        ("unmarked", ["register_mechanisms is not marked", "hookimpl"]),
        ("misspelt", ["register_mechanism'", "Did you mean 'register_mechanisms'"]),
        ("misdeclared", ["registry"]),
        ("asynchronous", ["coroutine"]),
        ("returns", ["list", "register(...)"]),
        ("hostile_name", ["SystemExit"]),
        ("twice", ["'twice' twice"]),
        ("reentrant_fails", ["RuntimeError"]),
        ("reserved", ["reference"]),
        ("uncalled", ["Fast(...)"]),
        ("mismeasures", ["needle", "harness's own"]),
        ("short_metric", ["out, ref, call", "(out, ref)"]),
        ("lost", ["ModuleNotFoundError", "farm_no_such_module"]),
        ("pointless", ["AttributeError", "NoSuchPlugin"]),
        ("malformed", ["Error"]),
    ],
)
def test_a_broken_plugin_is_named_with_its_reason_and_leaves_nothing(found, name, words):
    record = found["records"][name]
    assert record["status"] == "broken"
    assert record["distribution"] == f"{name}-dist"
    for word in words:
        assert word in record["reason"], record["reason"]
    assert len(record["reason"]) < 600 and "\n" not in record["reason"]
    for kind in ("mechanisms", "implementations", "inputs", "metrics"):
        assert record[kind] == []
    assert f"{name}-dist" not in found["providers"].values()


def test_every_plugin_of_the_farm_is_accounted_for(found):
    assert set(found["records"]) == {*BUILT_IN, *FARM, *MORE, "anonymous"}
    assert found["records"]["interrupts"]["status"] == "blocked"


def test_prints_go_to_standard_error(found):
    # `json.loads` of standard output has already shown that nothing went there.
    heard = found["stderr"].index("heard")
    assert found["stderr"].index("printed at import") > heard
    assert "printed in a hook" in found["stderr"]


def test_a_built_in_keeps_its_name_and_the_impostor_its_other_one(found):
    assert found["full"] == "sparseattn_full"
    record = found["records"]["impostor"]
    assert record["status"] == "broken"
    assert "'full' belongs to the built-in plugin 'full' of sparseattn" in record["reason"]
    assert record["mechanisms"] == ["impostor_own"]
    assert "impostor_own" in found["names"]
    assert found["records"]["full"]["status"] == "loaded"


def test_two_strangers_with_one_name_lose_it_both(found):
    assert "twin" not in found["names"] and "twin_a_own" in found["names"]
    for name, other in (("twin_a", "twin_b"), ("twin_b", "twin_a")):
        record = found["records"][name]
        assert record["status"] == "broken"
        assert "'twin'" in record["reason"] and f"{other}-dist" in record["reason"]
        assert "twin" not in record["mechanisms"]
    kind, message, _ = found["twin"]
    assert kind == "UnknownMechanismError"
    assert "twin_a-dist" in message and "twin_b-dist" in message
    assert "SPARSEATTN_PLUGINS=-twin_a" in message


def test_a_missing_name_points_to_the_plugins_that_might_have_had_it(found):
    kind, message, reasons = found["half_one"]
    assert kind == "UnknownMechanismError" and len(message) < 600
    assert any("'half' is broken: ValueError: half-way" in r for r in reasons)
    kind, message, reasons = found["unfrozn"]
    assert "'unfrozen' (broken)" in message
    assert any("'interrupts' is blocked" in r for r in reasons)


def test_a_plugin_may_use_the_registry_while_it_is_imported(found):
    seen = found["seen_while_loading"]
    assert {"full", "windowed", "linear", "bigbird"} <= set(seen)
    record = found["records"]["reentrant"]
    assert record["mechanisms"] == ["reentrant", "reentrant_two"]
    assert found["providers"]["reentrant"] == "reentrant-dist"
    assert "reentrant_fails" not in found["names"]


def test_register_is_dead_after_its_hook_returned(found):
    kind, message, _ = found["late"]
    assert kind == "PluginError" and "returned" in message


def test_implementations_for_what_someone_else_defines(found):
    adapters = {"flash_attn", "flex", "fla"}  # of our own distribution
    strangers = {
        name: [impl for impl in impls if impl not in adapters]
        for name, impls in found["extra"].items()
    }
    assert strangers == {
        "windowed": ["fast"],
        "block_sparse": ["fast"],
        "full": ["swift"],
        "dilated": [],
    }
    faster, usurper = found["records"]["faster"], found["records"]["usurper"]
    for record, other in ((faster, "usurper"), (usurper, "faster")):
        assert record["status"] == "broken"
        assert "'windowed:shared' is also registered by" in record["reason"]
        assert f"{other}-dist" in record["reason"]
    assert "'windowed:torch' is one of the mechanism's own" in usurper["reason"]
    assert "'block_sparse:torch' is one of the mechanism's own" in usurper["reason"]
    assert "'windoed'" in faster["reason"] and "'windowed'" in faster["reason"]
    assert usurper["implementations"] == ["full:swift"]
    assert faster["implementations"] == ["windowed:fast", "block_sparse:fast", "windoed:fast"]


def test_inputs_and_metrics(found):
    assert found["inputs"] == ["ramp"]
    assert found["metrics"] == ["bias_of_mean"]
    record = found["records"]["measures"]
    assert (record["inputs"], record["metrics"]) == (["ramp"], ["bias_of_mean"])


SETTINGS = """
    import json, os, warnings
    from sparseattn import registry
    answers = []
    for setting in json.loads(os.environ["ASKED"]):
        os.environ.pop("SPARSEATTN_PLUGINS", None)
        if setting is not None:
            os.environ["SPARSEATTN_PLUGINS"] = setting
        registry.reset()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            records = registry.diagnose()
        answers.append([
            [r.name for r in records if r.status == "loaded"],
            {r.name: [r.status, r.reason] for r in records if r.status != "loaded"},
            [str(w.message) for w in caught],
        ])
    print(json.dumps(answers))
"""


def test_sparseattn_plugins_chooses_the_entry_points(tmp_path):
    for name in ("one", "two"):
        install(
            tmp_path,
            name,
            f"""
            class Plugin:
                @sa.hookimpl
                def register_mechanisms(self, register):
                    register(make("{name}_mechanism"))
            """,
        )
    asked = [
        None,
        "",
        " ",
        "one",
        "one, full",
        "-one",
        "-one,-full",
        "one,two,-two",
        "onee",
        "-onee",
    ]
    adapters = ["fla", "flash_attn", "flex"]
    built_in = ["block_sparse", *adapters, "full", "linear", "windowed"]
    four = [name for name in built_in if name not in adapters]
    loaded = [
        [*built_in, "one", "two"],
        four,
        four,
        ["one"],
        ["full", "one"],
        [*built_in, "two"],
        ["block_sparse", *adapters, "linear", "windowed", "two"],
        ["one"],
        [],
        [*built_in, "one", "two"],
    ]
    replies = answers(tmp_path, SETTINGS, ASKED=json.dumps(asked))
    assert dict(zip(asked, (r[0] for r in replies), strict=True)) == dict(
        zip(asked, loaded, strict=True)
    )
    for setting, (names, rest, _) in zip(asked, replies, strict=True):
        assert {*names, *rest} >= {*built_in, "one", "two"}
        for name, (status, reason) in rest.items():
            assert "SPARSEATTN_PLUGINS" in reason
            assert status == ("broken" if name == setting == "onee" else "blocked")
    for at, status in ((8, "broken"), (9, "blocked")):
        _, rest, warned = replies[at]
        assert rest["onee"][0] == status and "Did you mean 'one'" in rest["onee"][1]
        assert warned == [rest["onee"][1]]
    assert all(not warned for _, _, warned in replies[:8])


def test_an_interrupt_passes_and_the_next_use_begins_again(farm):
    reply = answers(
        farm,
        """
        import json, os
        import sparseattn as sa
        from sparseattn import registry
        try:
            sa.list_mechanisms()
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        os.environ["SPARSEATTN_PLUGINS"] = "full,good"
        names = [r.name for r in sa.list_mechanisms()]
        print(json.dumps([interrupted, names, [r.reason for r in registry.diagnose()
                          if r.status == "broken"]]))
        """,
        SPARSEATTN_PLUGINS="full,good,interrupts",
    )
    assert reply[0] is True
    assert reply[1] == ["full", "good_one", "good_two"]
    assert reply[2] == []


def test_threads_discover_once_and_see_all(tmp_path):
    install(
        tmp_path,
        "slow",
        """
        import time
        time.sleep(0.5)
        print("imported")
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                time.sleep(0.5)
                register(make("slow_mechanism"))
        """,
    )
    done = python(
        tmp_path,
        """
        import json, threading
        import sparseattn as sa
        seen, ready = [], threading.Barrier(8)
        def use():
            ready.wait()
            seen.append([r.name for r in sa.list_mechanisms()])
            seen.append(sa.mechanism("slow_mechanism").name)
        threads = [threading.Thread(target=use) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(json.dumps(seen))
        """,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    lists = [s for s in seen if isinstance(s, list)]
    assert len(lists) == 8 and all(s == lists[0] for s in lists)
    assert "slow_mechanism" in lists[0]
    assert [s for s in seen if isinstance(s, str)] == ["slow_mechanism"] * 8
    assert done.stderr.count("imported") == 1


def test_two_threads_that_wait_for_one_another_get_an_error(tmp_path):
    # One imports a plugin, which asks the registry; the other discovers, and imports the plugin.
    install(
        tmp_path,
        "crossed",
        """
        import farm_crossing
        farm_crossing.importing.set()
        farm_crossing.discovering.wait(60)
        sa.list_mechanisms()
        class Plugin:
            @sa.hookimpl
            def register_mechanisms(self, register):
                register(make("crossed"))
        """,
    )
    (tmp_path / "farm_crossing.py").write_text(
        "import threading\nimporting, discovering = threading.Event(), threading.Event()\n"
    )
    reply = answers(
        tmp_path,
        """
        import json, threading
        import sparseattn as sa
        from sparseattn import discovery, registry
        import farm_crossing
        registry._PATIENCE = 2.0
        load = discovery.load
        def announced(found, staged):
            if found.point.name == "crossed":
                farm_crossing.discovering.set()
            load(found, staged)
        discovery.load = announced
        said = []
        def by_import():
            try:
                import farm_crossed
            except sa.PluginError as error:
                said.append(str(error))
        def by_use():
            farm_crossing.importing.wait(60)
            said.append("crossed" in [r.name for r in sa.list_mechanisms()])
        threads = [threading.Thread(target=f, daemon=True) for f in (by_import, by_use)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        print(json.dumps([said, [t.is_alive() for t in threads]]))
        """,
    )
    said, alive = reply
    assert alive == [False, False]
    # The second import, by the discovering thread, goes through: the plugin is there in the end.
    assert len(said) == 2 and True in said
    assert any("another thread has been loading plugins" in str(words) for words in said)


def test_a_loaded_export_finds_its_mechanism_in_a_fresh_process(tmp_path):
    saved = answers(
        tmp_path,
        """
        import json, torch
        import sparseattn as sa
        class Model(torch.nn.Module):
            def forward(self, q, k, v):
                return sa.attention(q, k, v, "windowed", window=3, causal=True)
        q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
        torch.export.save(torch.export.export(Model(), (q, k, v)), "model.pt2")
        print(json.dumps(Model()(q, k, v).flatten().tolist()))
        """,
    )
    loaded = answers(
        tmp_path,
        """
        import json, torch
        import sparseattn
        q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
        model = torch.export.load("model.pt2").module()
        print(json.dumps(model(q, k, v).flatten().tolist()))
        """,
    )
    assert loaded == saved


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    modules = answers(
        tmp_path,
        """
        import json, sys
        import sparseattn
        sparseattn.__version__, dir(sparseattn), sparseattn.hookimpl, sparseattn.PluginError
        print(json.dumps(sorted(sys.modules)))
        """,
    )
    heavy = ("torch", "numpy", "triton", "transformers", "altair", "typer", "rich", "sparseattn_")
    assert [m for m in modules if m.startswith(heavy)] == []
    modules = answers(
        tmp_path,
        """
        import json, sys, torch
        before = set(sys.modules)
        import sparseattn
        print(json.dumps(sorted(set(sys.modules) - before)))
        """,
    )
    # The operator alone, for exports; not torch's compiler, which takes a second.
    heavy = ("torch._dynamo", "triton", "transformers", "altair", "typer", "rich", "sparseattn_")
    assert "sparseattn.engines.op" in modules
    assert [m for m in modules if m.startswith(heavy)] == []
