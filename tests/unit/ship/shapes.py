"""Rewards of every shape that people write, as notebook cells; each is captured, and scored here and in a pod."""

from __future__ import annotations

from dataclasses import dataclass

INPUTS = [
    ("2+2=", "the answer is 4"),
    ("2+2=", r"so \boxed{4} costs $5 `date`"),
    ("", ""),
    ("naïve", "ünï “quotes” 'x' \"y\" \U0001f600"),
    ("a\nb", "line one\nline two\twith tab" * 3),
]
FILES = {
    "mylib.py": '''
"""A local module with a constant, an import of its own, and a helper."""
import math
import mylib_words

SCALE = 0.5


def score(text):
    return math.sqrt(len(text)) * SCALE + mylib_words.count(text)


def make_scorer(bonus):
    def scorer(prompt, response):
        return score(response) + bonus
    return scorer
''',
    "mylib_words.py": """
WORDS = {"answer", "line"}


def count(text):
    return sum(word in WORDS for word in text.split())
""",
    "mypack/__init__.py": """
from .rules import rule
""",
    "mypack/rules.py": """
from . import deep
from .deep.tables import TABLE


def rule(text):
    return TABLE.get(text[:1], deep.DEFAULT)
""",
    "mypack/deep/__init__.py": """
DEFAULT = -1.0
""",
    "mypack/deep/tables.py": """
TABLE = {'t': 1.0, 's': 2.0}
""",
}


@dataclass(frozen=True)
class Shape:
    """`text` holds cells, parted by `# %%`; `entry` is the expression that is given as reward_fn."""

    name: str
    text: str
    entry: str = "reward"
    how: str = "source"
    portable: bool = True
    """Whether another Python version can run it: not with packages that only this environment has, nor as a pickle."""

    @property
    def cells(self) -> list[str]:
        return self.text.lstrip("\n").split("# %%\n")


NINE = [
    Shape(
        "plain",
        """
def reward(prompt, response):
    return float('4' in response)
""",
    ),
    Shape(
        "characters",
        r'''
def reward(prompt, response):
    # a comment with `date`, $HOME and "quotes" '\'
    """Doc with $x$ and \\ and `ticks`."""
    good = "\\boxed{4}" in response and "$5" in response and "`date`" in response
    return float(good) + float('“quotes”' in response) * 2 + len(r'\n$\'') + 3 * ('😀' in response)
''',
    ),
    Shape(
        "closure",
        """
def make(target, weights):
    def inner(prompt, response):
        return weights[0] * (target in response)
    return inner
# %%
reward = make('4', [0.25, 1])
""",
    ),
    Shape(
        "helper in another cell",
        """
THRESHOLD = 3
WEIGHTS = {'a': 0.1, 'b': [1, 2.5]}
# %%
def helper(text):
    return len(text) > THRESHOLD
# %%
def reward(prompt, response):
    return WEIGHTS['b'][1] * helper(response) + WEIGHTS['a']
""",
    ),
    Shape(
        "lambda",
        """
reward = lambda prompt, response: float('4' in response) / 2
""",
    ),
    Shape(
        "callable instance",
        """
class Scorer:
    def __init__(self, target, weight):
        self.target = target
        self.weight = weight
        self.seen = []

    def __call__(self, prompt, response):
        return self.weight * response.count(self.target)
""",
        entry="Scorer('4', 0.75)",
    ),
    Shape(
        "partial",
        """
import functools
def graded(prompt, response, *, target, scale):
    return scale * response.count(target)
# %%
reward = functools.partial(graded, target='e', scale=0.1)
""",
    ),
    Shape(
        "local module",
        """
import mylib
# %%
def reward(prompt, response):
    return mylib.score(response)
""",
    ),
    Shape(
        "decorated",
        """
import functools
CALLS = []
def scaled(by):
    def wrap(fn):
        @functools.wraps(fn)
        def inner(prompt, response):
            return by * fn(prompt, response)
        return inner
    return wrap
# %%
@scaled(0.5)
def reward(prompt, response):
    return float('4' in response)
""",
    ),
]

MORE = [
    Shape(
        "async",
        """
import asyncio
async def reward(prompt, response):
    await asyncio.sleep(0)
    return len(response) / 10
""",
    ),
    Shape(
        "batched",
        """
def reward(prompts, responses):
    return [len(p) + len(r) / 7 for p, r in zip(prompts, responses)]
""",
    ),
    Shape(
        "nested helpers",
        """
def reward(prompt, response):
    def clean(text):
        return [w for w in text.split() if ok(w)]
    ok = lambda w: len(w) > 2
    return float(len(clean(response)))
""",
    ),
    Shape(
        "recursion",
        """
def depth(text):
    return 0 if len(text) < 2 else 1 + depth(text[: len(text) // 2])
# %%
def reward(prompt, response):
    return float(depth(response))
""",
    ),
    Shape(
        "mutual recursion",
        """
def even(n):
    return True if n == 0 else odd(n - 1)
def odd(n):
    return False if n == 0 else even(n - 1)
# %%
reward = lambda p, r: float(even(len(r)))
""",
    ),
    Shape(
        "closures that call each other",
        """
def make(limit):
    def even(n):
        return n <= limit and (n == 0 or odd(n - 1))
    def odd(n):
        return n > 0 and even(n - 1)
    def reward(prompt, response):
        return float(even(len(response) % 10)) + limit
    return reward
""",
        entry="make(50)",
    ),
    Shape(
        "closure with a counter",
        """
def make():
    calls = 0
    def bump():
        nonlocal calls
        calls += 1
        return calls
    def reward(prompt, response):
        return float(bump() > 0) + calls * 0
    return reward
""",
        entry="make()",
    ),
    Shape(
        "inheritance",
        """
import abc
class Base(abc.ABC):
    factor = 2
    @abc.abstractmethod
    def part(self, text): ...
    def __call__(self, prompt, response):
        return self.factor * self.part(response)
# %%
class Child(Base):
    __slots__ = ('bonus',)
    def __init__(self, bonus):
        super().__init__()
        self.bonus = bonus
    @property
    def double(self):
        return 2 * self.bonus
    @staticmethod
    def size(text):
        return len(text)
    def part(self, text):
        return self.double + self.size(text)
""",
        entry="Child(1.5)",
    ),
    Shape(
        "bound method",
        """
class Judge:
    def __init__(self):
        self.scale = 3
        self.rule = self.short
    def short(self, text):
        return len(text) < 20
    def grade(self, prompt, response):
        return float(self.rule(response)) * self.scale
""",
        entry="Judge().grade",
    ),
    Shape(
        "regex",
        r"""
import re
NUMBER = re.compile(r'(\d+)[^\d]*$', re.M | re.I)
# %%
def reward(prompt, response):
    found = NUMBER.search(response)
    return float(found.group(1)) if found else -1.0
""",
    ),
    Shape(
        "one lambda of several",
        """
pair = (lambda p, r: 1.0 * len(r), lambda p, r: 2.0 * len(r)); third = lambda p, r: 3.0 * len(r)
""",
        entry="pair[1]",
    ),
    Shape(
        "equal lambdas with other closures",
        """
makers = [lambda k: (lambda p, r: k * len(r)), lambda k: (lambda p, r: k + len(r))]
""",
        entry="makers[1](7)",
    ),
    Shape(
        "lambda over several lines",
        """
reward = (lambda prompt, response, *,
    weight=len('abc'):
        weight * len(response)  # why
)
""",
    ),
    Shape(
        "dataclass and enum constants",
        """
import enum
from dataclasses import dataclass, field
@dataclass(frozen=True)
class Rule:
    word: str
    weight: float = 1.0
    tags: list[str] = field(default_factory=list)
class Mode(enum.Enum):
    SOFT = 'soft'
    HARD = 'hard'
# %%
RULES = [Rule('answer', 2.0), Rule('4', tags=['n'])]
MODE = Mode.HARD
# %%
def reward(prompt, response):
    return sum(r.weight for r in RULES if r.word in response) * (2 if MODE is Mode.HARD else 1)
""",
    ),
    Shape(
        "constants of many kinds",
        r"""
import collections, datetime, decimal, fractions, pathlib
from collections import namedtuple
Point = namedtuple('Point', 'x y', defaults=[7])
TABLE = {('a', 1): {1, 2}, None: frozenset({'x'}), 2.5: [True, ..., b'\x00\xff'], 'big': 10 ** 30, 'inf': float('inf')}
NAN = float('nan')
COUNT = collections.Counter('aab')
ORDER = collections.OrderedDict([('z', 1), ('a', 2)])
LOOKUP = collections.defaultdict(list, {'k': [1]})
WHEN = datetime.datetime(2024, 2, 29, 12, 30)
D = decimal.Decimal('1.10')
F = fractions.Fraction(1, 3)
P = pathlib.Path('a') / 'b'
P1 = Point(3)
SHARED = [TABLE, TABLE]
# %%
def reward(prompt, response):
    assert TABLE is SHARED[0] is SHARED[1]
    return (len(TABLE) + COUNT['a'] + list(ORDER).index('a') + len(LOOKUP['missing']) + WHEN.day + float(D) + float(F)
        + len(P.parts) + P1.y + (NAN != NAN) + TABLE['big'] % 7 + (TABLE['inf'] > 1e300))
""",
    ),
    Shape(
        "from a local package",
        """
from mypack import rule
# %%
def reward(prompt, response):
    return rule(response)
""",
    ),
    Shape(
        "closure of a local module",
        """
import mylib
""",
        entry="mylib.make_scorer(4.0)",
    ),
    Shape(
        "function of a local module",
        """
from mylib import score as graded
reward = lambda p, r: graded(r)
""",
    ),
    Shape(
        "import inside",
        """
def reward(prompt, response):
    from mypack.deep.tables import TABLE
    import json as j
    return len(j.dumps(TABLE)) + 0.5
""",
    ),
    Shape(
        "submodules by attribute",
        """
import xml.etree.ElementTree
import os.path
# %%
def reward(prompt, response):
    node = xml.etree.ElementTree.fromstring('<a b="2"/>')
    return float(node.get('b')) + len(os.path.join('a', 'b'))
""",
    ),
    Shape(
        "defaults",
        """
LIMIT = 4
def reward(prompt, response, limit=LIMIT, *, names=('a', 'b'), scale: 'float' = 1.5):
    return scale * min(len(response), limit) + len(names)
# %%
LIMIT = 99
""",
    ),
    Shape(
        "loop variable",
        """
rewards = [lambda p, r, i=i: i + len(r) for i in range(3)]
""",
        entry="rewards[2]",
    ),
    Shape(
        "cached helper",
        """
import functools
@functools.lru_cache(maxsize=32)
def cost(n):
    return n * n
# %%
def reward(prompt, response):
    return float(cost(len(response)))
""",
    ),
    Shape(
        "redefined helper",
        """
def h(x):
    return 1.0
# %%
def reward(prompt, response):
    return h(response)
# %%
def h(x):
    return 2.0 + len(x)
""",
    ),
    Shape(
        "hidden original",
        """
def loud(fn):
    def inner(prompt, response):
        return fn(prompt, response) + 10
    return inner
# %%
def reward(prompt, response):
    return 1.0
# %%
reward = loud(loud(reward))
""",
    ),
    Shape(
        "attributes",
        """
def reward(prompt, response):
    return reward.weight * len(response)
reward.weight = 0.25
""",
    ),
    Shape(
        "global counter",
        """
CALLS = 0
def reward(prompt, response):
    global CALLS
    CALLS += 1
    return float(CALLS > 0)
""",
    ),
    Shape(
        "future annotations",
        """
from __future__ import annotations
def reward(prompt: NotThere, response: str) -> Missing:
    def inner(x: Nope) -> Nope:
        return len(x)
    return float(inner(response))
""",
    ),
    Shape(
        "lock and logger",
        """
import logging, threading
LOCK = threading.Lock()
log = logging.getLogger('mine')
# %%
def reward(prompt, response):
    with LOCK:
        log.debug('x')
        return float(len(response))
""",
    ),
    Shape(
        "several",
        """
def a(prompt, response):
    return 1.0
def b(prompt, response):
    return len(response) * 1.0
""",
        entry="[a, b]",
    ),
    Shape(
        "by name",
        """
def a(prompt, response):
    return 1.0
rewards = {'a': a, 'length': lambda p, r: float(len(r))}
""",
        entry="rewards",
    ),
    Shape(
        "multi-line strings",
        """
class Box:
    class Inner:
        pass
    def make(self):
        def reward(prompt, response):
            text = '''one
  two
three'''
            return float(len(text))
        return reward
""",
        entry="Box().make()",
    ),
    Shape(
        "builtin and installed",
        """
from math import sqrt
from string import ascii_lowercase as letters
size = len
# %%
def reward(prompt, response):
    return sqrt(size(response)) + size(letters)
""",
    ),
    Shape(
        "numpy",
        """
import numpy as np
GRID = np.arange(6, dtype=np.float32).reshape(2, 3)
ONE = np.float64(0.1)
# %%
def reward(prompt, response):
    return float(GRID.sum() + ONE + np.linalg.norm(GRID))
""",
        portable=False,
    ),
    Shape(
        "generic class",
        """
from typing import Generic, TypeVar
class Holder(list):
    def __call__(self, prompt, response):
        return sum(self) + len(response) + self.extra
# %%
h = Holder([1, 2]); h.extra = 5
""",
        entry="h",
    ),
    Shape(
        "no source",
        r"""
exec('def reward(prompt, response):\n    return 3.0 + len(response)\n')
""",
        how="pickle",
        portable=False,
    ),
    Shape(
        "third-party object",
        """
import pydantic
class Rule(pydantic.BaseModel):
    weight: float
RULE = Rule(weight=0.5)
# %%
def reward(prompt, response):
    return RULE.weight * len(response)
""",
        portable=False,
    ),
    Shape(
        "environment",
        """
from nemo_rl.environments import Environment
class Math(Environment):
    def __init__(self, bonus):
        super().__init__()
        self.bonus = bonus
    def score(self, prompt, response, **columns):
        return self.bonus + len(response)
""",
        entry="Math(2)",
        portable=False,
    ),
]

TRICKY = [
    Shape(
        "a registry filled by decorators",
        """
CHECKS = {}
def check(name):
    def keep(fn):
        CHECKS[name] = fn
        return fn
    return keep
# %%
@check("long")
def is_long(text):
    return len(text) > 10
@check("four")
def has_four(text):
    return "4" in text
# %%
def reward(prompt, response):
    return float(sum(c(response) for c in CHECKS.values()))
""",
    ),
    Shape(
        "a class attribute set later",
        """
class Judge:
    bonus = 1
    def __call__(self, prompt, response):
        return self.bonus + len(response)
Judge.bonus = 7
""",
        entry="Judge()",
        how="pickle",
        portable=False,
    ),
    Shape(
        "an instance of a class that was redefined",
        """
class Judge:
    def __call__(self, prompt, response):
        return 1.0
old = Judge()
# %%
class Judge:
    def __call__(self, prompt, response):
        return 2.0
""",
        entry="old",
    ),
    Shape(
        "two functions with one global counter",
        """
N = 0
def bump(prompt, response):
    global N
    N += 1
    return 0.0
def read(prompt, response):
    return float(N)
""",
        entry="[bump, read]",
    ),
    Shape(
        "modern syntax",
        """
import contextlib
from dataclasses import dataclass
@dataclass(slots=True, order=True)
class Seen:
    n: int = 0
@contextlib.contextmanager
def counting(seen):
    seen.n += 1
    yield seen
SEEN = Seen(3)
def reward(prompt: str, response: str, /, *extra: int, **columns: object) -> float:
    match response.split():
        case [first, *_] if (size := len(first)) > 2:
            kind = f"{size!r:>3}{'x' * (2 if prompt else 3)}"
        case _:
            kind = ""
    with counting(SEEN) as seen:
        total = sum(ord(c) for c in kind) + (seen.n > 3)
    try:
        return {"a": total}["b"]
    except* KeyError:
        pass
    return total / 3
""",
    ),
    Shape(
        "metaclass and super",
        """
class Meta(type):
    def __new__(mcls, name, bases, space):
        space["tag"] = name.lower()
        return super().__new__(mcls, name, bases, space)
class Base(metaclass=Meta):
    kinds = []
    def __init_subclass__(cls, **kw):
        super().__init_subclass__(**kw)
        Base.kinds.append(cls.__name__)
    def value(self):
        return 1.0
class Child(Base):
    def value(self):
        return super().value() + len(self.tag)
    @classmethod
    def make(cls):
        return cls()
    def __call__(self, prompt, response):
        return self.value() + len(Base.kinds)
""",
        entry="Child.make()",
    ),
    Shape(
        "a class inside a function",
        """
def make(bonus):
    class Inner:
        def __call__(self, prompt, response):
            return bonus + len(response)
    return Inner()
""",
        entry="make(3)",
        how="pickle",
        portable=False,
    ),
    Shape(
        "a class without outer variables inside a function",
        """
def make():
    class Inner:
        def __init__(self):
            self.parent = self
        def __call__(self, prompt, response):
            return 1.0 + len(response)
    return Inner()
""",
        entry="make()",
    ),
    Shape(
        "stacked decorators",
        """
import functools, time
def timed(fn):
    fn.calls = []
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return fn(*args, **kwargs)
        finally:
            wrapper.calls.append(time.perf_counter() - start)
    wrapper.calls = []
    return wrapper
class Twice:
    def __init__(self, fn):
        functools.update_wrapper(self, fn)
        self.fn = fn
    def __call__(self, prompt, response):
        return 2 * self.fn(prompt, response)
# %%
@Twice
@timed
@functools.lru_cache
def reward(prompt, response):
    return float(len(response))
""",
    ),
    Shape(
        "decorated and called before",
        """
def counted(fn):
    state = {"n": 0}
    def inner(prompt, response):
        state["n"] += 1
        return fn(prompt, response) + state["n"] * 0
    inner.state = state
    return inner
@counted
def reward(prompt, response):
    return float(len(response))
reward("a", "b")
""",
    ),
    Shape(
        "nemo_rl decorators",
        """
from nemo_rl.environments import batched_reward, reward_function
@reward_function
def one(prompt, response, answer="4"):
    return float(answer in response)
@batched_reward
def many(prompts, responses):
    return [float(len(r)) for r in responses]
""",
        entry="[one, many]",
        portable=False,
    ),
    Shape(
        "data shared with a module",
        """
import mypack.deep.tables as tables
from mypack.deep.tables import TABLE
def reward(prompt, response):
    return float(TABLE is tables.TABLE) + len(TABLE)
""",
    ),
    Shape(
        "one text twice on a line",
        """
def outer(k):
    return (lambda p, r: k), (lambda p, r: k), [lambda p, r, k=i: k for i in range(2)]
pair = outer(5)
""",
        entry="[pair[1], pair[2][1]]",
    ),
    Shape(
        "tabs and continuation",
        """
if True:
	def reward(prompt,
		response):
		total = len(response) + \\
			1
		return float(total)
""",
    ),
    Shape(
        "one local function under two names",
        """
from mylib import score, score as other
import mylib as m
def reward(prompt, response):
    return score(response) + other(response) + m.score(response) + m.mylib_words.count(response)
""",
    ),
    Shape(
        "a changed constant of a local module",
        """
import mylib
mylib.SCALE = 9.0
def reward(prompt, response):
    return mylib.score(response)
""",
        how="pickle",
        portable=False,
    ),
    Shape(
        "a replaced function of a local module",
        """
import mylib
mylib.SCALE = 0.5
mylib.mylib_words.count = lambda text: 100
def reward(prompt, response):
    return mylib.score(response)
""",
        how="pickle",
        portable=False,
    ),
]

SHAPES = {shape.name: shape for shape in NINE + MORE + TRICKY}
