from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_rl.backends.kubernetes.ship.capture import HERE, capture, importable
from nemo_rl.backends.kubernetes.ship.chunks import render
from nemo_rl.backends.kubernetes.ship.describe import describe, difference
from nemo_rl.backends.kubernetes.ship.emit import Emitter, NameIt
from nemo_rl.backends.kubernetes.ship.errors import NotSource, ShipError
from nemo_rl.backends.kubernetes.ship.tokens import refuse_tokens
from nemo_rl.worker import bundles
from unit.ship.conftest import find_python

ROOT = str(Path(__file__).parents[3])
CELLS = """
import linecache, sys
def cell(text, name):
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec", dont_inherit=True), sys.modules["__main__"].__dict__)
"""
SHIP = """
import sys
sys.path.append({root!r})
from pathlib import Path
from nemo_rl.backends.kubernetes.ship.capture import capture
from nemo_rl.backends.kubernetes.ship.check import write_files
from nemo_rl.backends.kubernetes.ship.errors import NotSource, ShipError
def ship(obj, **options):
    try:
        found = capture(obj, **options)
    except ShipError as error:
        print("REFUSED", error)
        return
    write_files(found.files, Path({out!r}))
    print(found.how, found.archive.sha256 if found.files else found.function, *found.notes)
"""
CALL = """
import sys, traceback
sys.path.append({root!r})
from pathlib import Path
from nemo_rl.worker.bundles import load_entry
reward = load_entry(Path({out!r}))
try:
    print(reward("2+2=", "4"))
except Exception:
    traceback.print_exc(file=sys.stdout)
"""


class Client:
    """A user's folder whose scripts run as processes of their own, and a pod that loads what they ship."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.folder = folder
        self.out = folder / "out"

    def write(self, name: str, text: str) -> None:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def run(self, text: str, *, name: str = "train.py", python: str = sys.executable, **environment: str) -> str:
        """Runs a script that may call ship(obj); its output."""
        self.write("shipping.py", SHIP.format(root=ROOT, out=str(self.out)))
        self.write(name, text)
        done = subprocess.run(
            [python, name],
            cwd=self.home,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pod(self) -> str:
        """Loads the one entry in a fresh process and calls it; its output, with the traceback if it raises."""
        text = CALL.format(root=ROOT, out=str(self.out))
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


# --- the first rung: by name ---


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (json.dumps, "json:dumps"),
        (capture, "nemo_rl.backends.kubernetes.ship.capture:capture"),
        (dict, "builtins:dict"),
    ],
)
def test_what_is_installed_travels_by_its_name(obj: Any, expected: str) -> None:
    assert importable(obj) == expected
    found = capture(obj)
    assert (found.how, found.function, found.files) == ("function", expected, {})


@pytest.mark.parametrize("obj", [lambda p, r: 1.0, find_python, Client, [json.dumps], "text".startswith])
def test_code_of_the_user_is_never_taken_to_be_in_the_image(obj: Any) -> None:
    assert importable(obj) is None


# --- the readable bundle ---


def test_the_bundle_holds_the_text_as_it_was_written_and_says_where_it_is_from(client: Client) -> None:
    text = "from shipping import ship\n\nLIMIT = 3\n\ndef reward(prompt, response):  # as   written\n    return LIMIT\nship(reward)\n"
    client.run(text)
    shipped = (client.out / "code" / "reward.py").read_text()
    assert "# train.py, line 5\ndef reward(prompt, response):  # as   written\n    return LIMIT\n" in shipped
    assert "LIMIT = 3" in shipped
    assert str(client.home) not in shipped, "the user's folders stay private"


def test_equal_code_has_equal_names_in_another_process_cell_and_folder(tmp_path: Path) -> None:
    told = []
    for i, name in enumerate(["<ipython-input-3-abc>", "/tmp/ipykernel_99/1234.py"]):
        (tmp_path / str(i)).mkdir()
        client = Client(tmp_path / str(i))
        cells = f'from shipping import ship\n{CELLS}\ncell("""WORDS = set("abcdefgh")\ndef reward(p, r):\n    return len(WORDS)\n""", {name!r})\nship(reward)\n'
        told.append(client.run(cells, PYTHONHASHSEED=str(i + 1)))
    assert told[0].startswith("source ")
    assert told[0] == told[1]


def test_packages_that_the_image_needs_are_named_with_their_versions(client: Client) -> None:
    text = "from shipping import capture\nimport yaml\ndef reward(p, r):\n    return len(yaml.safe_load(r))\nprint(dict(capture(reward).imports))"
    import yaml

    assert client.run(text).strip() == str({"yaml": yaml.__version__})


def test_a_package_that_the_image_lacks_is_named(client: Client) -> None:
    client.run(
        "from shipping import ship\nimport yaml\ndef reward(p, r):\n    return yaml.safe_load(r)\nship(reward)\n"
    )
    file = client.out / "code" / "reward.py"
    file.write_text(file.read_text().replace("import yaml", "import yamm"))
    manifest = json.loads((client.out / bundles.MANIFEST).read_text())
    manifest["imports"] = {"yamm": "1.2.3"}
    (client.out / bundles.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(bundles.BundleError, match=r"imports yamm \(1\.2\.3 where the job was submitted\)"):
        bundles.load_entry(client.out)


# --- tracebacks ---


def test_a_traceback_in_the_pod_cites_the_users_file_line_and_text(client: Client) -> None:
    text = "from shipping import ship\n\n\ndef helper(r):\n    # why\n    return 1 / len(r[9:])\n\n\n\ndef reward(p, r):\n    return helper(r)\nship(reward)\n"
    client.run(text)
    told = client.pod()
    assert 'File "train.py", line 11, in reward\n    return helper(r)' in told
    assert 'File "train.py", line 6, in helper\n    return 1 / len(r[9:])' in told


def test_a_traceback_through_a_cell_cites_the_cell_by_what_it_defines(client: Client) -> None:
    cells = f'from shipping import ship\n{CELLS}\ncell("""\n\n@lambda f: f\ndef reward(p, r):\n    return {{}}[r]\n""", "<ipython-input-1-a>")\nship(reward)\n'
    client.run(cells)
    assert 'File "<cell defining reward>", line 5, in reward\n    return {}[r]' in client.pod()


def test_a_traceback_through_a_closure_and_a_local_module_has_their_lines(client: Client) -> None:
    client.write("lib/__init__.py", "")
    client.write("lib/rules.py", "\n\ndef rule(r):\n    raise KeyError(r)\n")
    text = (
        "from shipping import ship\nfrom lib.rules import rule\ndef make(k):\n    x = 1\n    def inner(p, r):\n"
        "        y = k\n        return rule(r)\n    return inner\nship(make(2))\n"
    )
    client.run(text)
    told = client.pod()
    assert 'File "train.py", line 7, in inner\n    return rule(r)' in told
    assert 'File "lib/rules.py", line 4, in rule\n    raise KeyError(r)' in told


# --- what is not what it seems ---


def test_a_file_edited_after_import_is_never_shipped_as_it_reads_now(client: Client) -> None:
    client.write("mine.py", "def reward(p, r):\n    return 1.0\n")
    text = (
        "from shipping import ship\nimport mine, pathlib\n"
        "pathlib.Path('mine.py').write_text('def reward(p, r):\\n    return 2.0\\n')\nship(mine.reward)\n"
    )
    told = client.run(text)
    assert told.startswith("pickle "), told
    assert client.pod().strip() == "1.0"


def test_a_script_edited_while_it_runs_is_never_shipped_as_it_reads_now(client: Client) -> None:
    text = (
        "from shipping import ship\nimport pathlib\ndef reward(p, r):\n    return 1.0\n"
        "me = pathlib.Path('train.py')\nme.write_text(me.read_text().replace('return 1.0', 'return 2.0'))\nship(reward)\n"
    )
    told = client.run(text)
    assert told.startswith("pickle ")
    assert "edited after it was loaded" in told
    assert client.pod().strip() == "1.0"


def test_a_local_module_found_only_at_run_time_travels_too(client: Client) -> None:
    client.write("plugins/__init__.py", "import importlib\nfound = importlib.import_module('plugins.' + 'one')\n")
    client.write("plugins/one.py", "VALUE = 4.5\n")
    text = (
        "from shipping import ship\nimport plugins\ndef reward(p, r):\n    return plugins.found.VALUE\nship(reward)\n"
    )
    told = client.run(text, PYTHONPATH=str(client.home))
    assert told.startswith("source ")
    assert client.pod().strip() == "4.5"


# --- refusals ---

REFUSED = {
    "an open connection": (
        "import sqlite3\ndb = sqlite3.connect(':memory:')\ndef reward(p, r):\n    return db.total_changes",
        ["global db", "sqlite3.Connection", "inside it on first use"],
    ),
    "a socket in a closure": (
        "import socket\ndef make(s):\n    def reward(p, r):\n        return s.fileno()\n    return reward\n"
        "reward = make(socket.socket())",
        ["variable s around reward", "socket.socket"],
    ),
    "a generator in an instance": (
        "class Judge:\n    def __init__(self):\n        self.stream = (x for x in [1])\n    def __call__(self, p, r):\n"
        "        return 1.0\nreward = Judge()",
        ["attribute stream of an object of Judge", "generator"],
    ),
    "its own file": (
        "import pathlib\ndef reward(p, r):\n    return pathlib.Path(__file__).exists()",
        ["__file__", "does not exist in the pod"],
    ),
    "a token": (
        "KEY = 'hf_' + 'abcdefghij0123456789'\ndef reward(p, r):\n    return len(KEY)",
        ["access token", "Secret"],
    ),
    "a closure that shares what it changes": (
        "def make():\n    n = 0\n    def bump(p, r):\n        nonlocal n\n        n += 1\n    def read(p, r):\n        return n\n"
        "    return [bump, read]\nreward = make()",
        ["variable n", "object of a class"],
    ),
    "a module named as a standard one": (
        "import pathlib, sys, importlib\npathlib.Path('statistics.py').write_text('X = 1')\nimport statistics\n"
        "def reward(p, r):\n    return statistics.X",
        ["statistics", "rename"],
    ),
    "compiled code of the user's": (
        "import importlib.machinery, importlib.util, pathlib, shutil, sys, _json\nreal = _json.__file__\n"
        "name = 'fast' + importlib.machinery.EXTENSION_SUFFIXES[0]\nshutil.copy(real, name)\n"
        "spec = importlib.util.spec_from_file_location('fast', name, loader=importlib.machinery.ExtensionFileLoader('_json', name))\n"
        "import types\nfast = sys.modules['fast'] = types.ModuleType('fast')\nfast.__spec__ = spec\nfast.__file__ = name\n"
        "def reward(p, r):\n    return fast",
        ["'fast'", "compiled code", "image"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_travel_is_refused_by_name_with_the_cure(case: str, client: Client) -> None:
    text, expected = REFUSED[case]
    told = client.run(f"from shipping import ship\n{text}\nship(reward)\n")
    assert told.startswith("REFUSED"), told
    for part in expected:
        assert part in told
    assert "0123456789" not in told


def test_a_pickle_for_an_image_of_another_python_is_refused_before_submit(client: Client) -> None:
    text = "exec('def reward(p, r):\\n    return 1.0')\nfrom shipping import ship\nship(reward, image_python='3.99')\n"
    told = client.run(text)
    assert told.startswith("REFUSED")
    assert f"found {HERE} here, 3.99 in the image" in told
    assert "its source text is not available" in told


def test_a_pickle_of_the_same_python_says_why_it_is_one() -> None:
    space: dict[str, Any] = {}
    exec("def reward(p, r):\n    return 1.0", space)
    found = capture(space["reward"], image_python=HERE)
    assert (found.how, found.python) == ("pickle", HERE)
    assert "source text is not available" in found.notes[0]
    assert found.archive.spec("code", found.python).python == HERE


def test_the_secret_of_a_refusal_is_not_in_its_message() -> None:
    with pytest.raises(ShipError) as caught:
        refuse_tokens({"code/reward.py": b"a = 1\nKEY = 'ghp_0123456789abcdefghij'\n"})
    assert "line 2" in str(caught.value)
    assert "0123456789" not in str(caught.value)


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_a_client_of_another_python_ships_source_that_scores_equal_here(version: str, client: Client) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    client.write("mylib.py", "import math\nSCALE = 2.0\ndef score(r):\n    return SCALE * math.sqrt(len(r))\n")
    text = (
        f"import sys\nsys.path.append({ROOT!r})\nfrom pathlib import Path\n"
        "from nemo_rl.backends.kubernetes.ship.emit import Emitter\n"
    )
    text += (
        "from nemo_rl.backends.kubernetes.ship.chunks import render\nimport functools, json, re, mylib\n"
        "WORDS = {'b', 'a'}\nNUMBER = re.compile('[0-9]')\ndef scaled(by):\n    def wrap(fn):\n        @functools.wraps(fn)\n"
        "        def inner(p, r):\n            return by * fn(p, r)\n        return inner\n    return wrap\n"
        "def helper(r):\n    return len(WORDS) + bool(NUMBER.search(r))\n@scaled(0.5)\ndef reward(prompt: str, response: str) -> float:\n"
        "    return helper(response) + mylib.score(response) + sum([len(w) for w in response.split()])\n"
        "emitter = Emitter(True, set(), [])\nname = emitter.entry(reward, 'reward')\n"
        "text, chunks = render('t', emitter.imports, emitter.chunks)\n"
        "manifest = dict(format=1, kind='source', entries={'reward': name}, file='code/reward.py', chunks=chunks,\n"
        "    modules=emitter.modules.entries, imports={})\n"
        "out = Path(" + repr(str(client.out)) + ")\n"
        "for file, data in {'bundle.json': json.dumps(manifest).encode(), 'code/reward.py': text.encode(), **emitter.modules.files}.items():\n"
        "    (out / file).parent.mkdir(parents=True, exist_ok=True)\n    (out / file).write_bytes(data)\n"
        "print(reward('2+2=', '4'))\n"
    )
    assert client.run(text, python=python) == client.pod()


# --- values ---

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**40, max_value=10**4200)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.just(...)
)
HASHABLE = st.recursive(ATOMS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(HASHABLE, inner, max_size=4)
        | st.sets(HASHABLE, max_size=4)
    ),
    max_leaves=12,
)


def emitted(value: Any) -> tuple[Emitter | None, str]:
    """The value as text; None where it holds a NaN with a payload, which text cannot."""
    named: set[int] = set()
    while True:
        emitter = Emitter(True, named, [])
        try:
            return emitter, emitter.entry(value, "value")
        except NameIt as shared:
            named.add(shared.identity)
        except NotSource:
            return None, ""


@given(VALUES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_constant_is_exactly_itself_after_the_round_trip_or_refused(value: Any) -> None:
    emitter, name = emitted(value)
    if emitter is None:
        assert "nan" in repr(value)
        return
    text, chunks = render("a value", emitter.imports, emitter.chunks)
    module: dict[str, Any] = {}
    text.encode("utf-8")
    for chunk in chunks:
        exec("\n".join(text.split("\n")[chunk["start"] - 1 : chunk["end"]]), module)
    assert difference(describe(value), describe(module[name])) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("a", b"a"),
        ([1], (1,)),
        ({1: 2, 3: 4}, {3: 4, 1: 2}),
        (frozenset([1]), {1}),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + 1, lambda x: x + 1.0),
        (lambda x=1: x, lambda x=2: x),
        ([[0]] * 2, [[0], [0]]),
    ],
)
def test_descriptions_tell_apart_what_a_reward_could_tell_apart(one: Any, other: Any) -> None:
    assert difference(describe(one), describe(other)) is not None
    assert difference(describe(one), describe(one)) is None
