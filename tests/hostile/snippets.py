"""What a model may write that means harm, or does it by accident: one property a snippet, and how it has to end."""

from __future__ import annotations

from dataclasses import dataclass

from tap_eval.proxies.proxy import Failure

LAYERS = [{"name": "a", "std": 1.0, "out_channels": 2}, {"name": "b", "std": 2.0, "out_channels": 2}]
CALL = "sensitivity(layers, task)"


@dataclass(frozen=True)
class Snippet:
    """The body of a `sensitivity(layers, task)`; lines after the first are indented by four spaces more."""

    name: str
    body: str
    ends: tuple[Failure, ...]
    """in a sandbox; of several the one that comes first"""
    refused: Failure | None = None
    """by the list on the host, so that no machine of others' gets to run it"""

    @property
    def code(self) -> str:
        """The whole proxy."""
        body = self.body.replace("\n", "\n    ")
        return f"import math\ndef sensitivity(layers, task):\n    {body}\n"


def _all(ends: tuple[Failure, ...], refused: Failure | None = None, /, **bodies: str) -> list[Snippet]:
    return [Snippet(name.replace("_", " "), body, ends, refused) for name, body in bodies.items()]


_ERROR, _TIME, _MEMORY, _SHAPE = (Failure.ERROR,), (Failure.TIMEOUT,), (Failure.MEMORY,), (Failure.WRONG_SHAPE,)
_COSTLY = (Failure.TIMEOUT, Failure.MEMORY)
_STRANGE = (Failure.ERROR, Failure.MEMORY, Failure.TIMEOUT, Failure.WRONG_SHAPE)

REACHING = _all(
    _ERROR,
    Failure.FORBIDDEN,
    reads_a_file="return open('/etc/passwd').read()",
    writes_a_file="return open('/tmp/tap-was-here', 'w').write('x')",
    reads_by_pathlib="from pathlib import Path\nreturn Path('/etc/passwd').read_text()",
    writes_by_pathlib="from pathlib import Path\nreturn Path('/tmp/tap-was-here').write_text('x')",
    reads_by_io="import io\nreturn io.open('/etc/passwd').read()",
    lists_a_folder="import os\nreturn os.listdir('/')",
    walks_folders="import os\nreturn list(os.walk('/'))[0]",
    removes_a_file="import os\nreturn os.remove('/tmp/tap-was-here')",
    makes_a_folder="import os\nreturn os.mkdir('/tmp/tap-was-here')",
    makes_a_temporary_file="import tempfile\nreturn tempfile.mkstemp()",
    copies_a_tree="import shutil\nreturn shutil.copytree('/etc', '/tmp/tap-was-here')",
    reads_the_environment="import os\nreturn os.environ['PATH']",
    asks_for_a_variable="import os\nreturn os.getenv('OPENAI_API_KEY')",
    sets_a_variable="import os\nreturn os.putenv('PATH', '/tmp')",
    starts_a_shell="import os\nreturn os.system('id')",
    starts_a_process="import subprocess\nreturn subprocess.run('id')",
    forks="import os\nreturn os.fork()",
    kills_its_parent="import os\nreturn os.kill(os.getppid(), 9)",
    leaves_at_once="import os\nreturn os._exit(0)",
    starts_a_thread="import threading\nreturn threading.Thread(target=print).start()",
    starts_workers="import multiprocessing\nreturn multiprocessing.Pool(4)",
    opens_a_socket="import socket\nreturn socket.socket()",
    asks_the_web="import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1:9')",
    asks_by_http="import http.client\nreturn http.client.HTTPConnection('127.0.0.1', 9)",
    loads_a_library="import ctypes\nreturn ctypes.CDLL(None)",
    maps_memory="import mmap\nreturn mmap.mmap(-1, 10)",
    unpickles="import pickle\nreturn pickle.loads(b'cos\\nsystem\\n(S\"id\"\\ntR.')",
    imports_torch="import torch\nreturn torch.zeros(1)",
    imports_numpy="import numpy as np\nreturn np.zeros(1)",
    imports_the_program="import tap_eval\nreturn tap_eval",
    imports_by_name="return __import__('os').getpid()",
    imports_by_importlib="import importlib\nreturn importlib.import_module('os').getpid()",
    sees_frames="import inspect\nreturn inspect.currentframe().f_back.f_globals",
    sees_modules="import sys\nreturn sys.modules['os'].getpid()",
    asks_for_input="return input()",
    asks_for_the_builtins="return __builtins__['open']",
    asks_for_globals="return globals()['open']",
    climbs_to_object="return ().__class__.__base__.__subclasses__()",
    climbs_by_type="return type(()).__base__.__subclasses__()",
    climbs_by_function="return sensitivity.__globals__",
    climbs_by_code="return sensitivity.__code__.co_consts",
    climbs_by_error="try:\n    1 / 0\nexcept Exception as e:\n    return e.__traceback__.tb_frame.f_globals",
    climbs_by_getattr="return getattr((), '__class__').__base__",
    climbs_by_vars="return vars(math)['__loader__'].load_module('os')",
    breaks_into_the_debugger="breakpoint()\nreturn [1]",
    collects_objects="import gc\nreturn gc.get_objects()",
    leaves_at_the_end="import atexit\nreturn atexit.register(print).missing",
    handles_a_signal="import signal\nreturn signal.signal(9, print)",
    lifts_its_limits="import resource\nreturn resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    reads_its_own_process="return open('/proc/self/environ').read()",
    makes_a_class="class A(type(open)): pass\nreturn A",
    raises_to_leave="raise SystemExit(0)",
    raises_an_interrupt="raise KeyboardInterrupt",
)

ENDLESS = [
    *_all(
        _TIME,
        loops="while True: pass",
        loops_and_catches="while True:\n    try:\n        while True: pass\n    except Exception: pass",
        loops_in_finally="try:\n    1 / 0\nfinally:\n    while True: pass",
        adds_up_a_range="n = 0\nfor i in range(10**12): n += i\nreturn [n]",
        calls_itself_twice="def g(n): return g(n - 1) + g(n - 1) if n else 1\nreturn [g(60)]",
        sorts_by_a_slow_key="return sorted(range(10**5), key=lambda i: len([j for j in range(10**5)]))",
        multiplies_all_pairs="s = 0.0\nfor a in range(10**5):\n    for b in range(10**5): s += a * b\nreturn [s]",
    ),
    *_all(
        _COSTLY,
        looks_for_what_is_not_there="return any(i < 0 for i in range(10**12))",
        adds_to_what_it_walks="x = [1]\nfor y in x: x.append(y)",
        takes_a_root_of_a_huge_number="return math.isqrt(10**4_000_000)",
    ),
]

GREEDY = [
    *_all(
        _MEMORY,
        repeats_a_text="return 'x' * 10**10",
        repeats_a_list="return [0] * 10**10",
        keeps_texts="x = []\nwhile True: x.append('y' * 10**5)",
        doubles_a_text="x = 'y'\nwhile True: x += x",
        doubles_a_list="x = [0]\nwhile True: x += x",
        tells_more_than_it_holds="x = 0\nfor _ in range(40): x = [x] * 10\nreturn x",
    ),
    *_all(
        _COSTLY,
        lists_a_range="return list(range(10**12))",
        fills_a_dict="x = {}\ni = 0\nwhile True:\n    x[i] = [i]\n    i += 1",
        fills_a_set="x = {0}\ni = 0\nwhile True:\n    x.add(str(i) * 99)\n    i += 1",
        lists_all_pairs="return [(a, b) for a in range(10**5) for b in range(10**5)]",
        joins_texts="x = ['y' * 10**5]\nwhile True: x.append(''.join(x))",
        splits_a_text="return (' x' * 10**7).split()",
    ),
    *_all(
        _STRANGE,
        shifts_far="return 1 << 10**12",
        takes_a_huge_power="return 10 ** 10 ** 10",
        takes_a_factorial="return math.factorial(10**8)",
        pads_a_number="return format(1.0, '.999999999f')",
        pads_a_text="return format('x', '999999999')",
        justifies_a_text="return 'x'.ljust(10**10)",
        replaces_by_more="return ('x' * 10**5).replace('x', 'y' * 10**5)",
        writes_a_huge_number="return str(10 ** 4_000_000)",
        reads_a_huge_number="return int('9' * 10**7)",
    ),
]

DEEP = _all(
    _STRANGE,
    calls_itself="return sensitivity(layers, task)",
    calls_itself_and_catches="try: return sensitivity(layers, task)\nexcept Exception: return sensitivity([], task)",
    calls_in_a_circle="def g(): return h()\ndef h(): return g()\nreturn g()",
    nests_a_list="x = 0\nfor _ in range(10**5): x = [x]\nreturn x",
    nests_a_dict="x = 0\nfor _ in range(10**5): x = {'a': x}\nreturn x",
    compares_nested_lists="x = y = 0\nfor _ in range(10**5): x, y = [x], [y]\nreturn [x == y, 1]",
    shows_a_nested_list="x = 0\nfor _ in range(10**5): x = [x]\nreturn repr(x)",
    hashes_a_nested_tuple="x = ()\nfor _ in range(10**5): x = (x,)\nreturn {x: 1}",
    sorts_nan="return sorted([float('nan'), 1.0, float('nan'), 0.0] * 99, key=lambda i: i) * 0",
)

FORMS = [
    *_all(
        _SHAPE,
        gives_nothing="pass",
        gives_a_number="return 1.0",
        gives_a_text="return 'ab'",
        gives_true="return True",
        gives_a_dict="return {'a': 1.0, 'b': 2.0}",
        gives_too_few="return [1.0]",
        gives_too_many="return [1.0, 2.0, 3.0]",
        gives_texts="return ['1.0', '2.0']",
        gives_truths="return [True, False]",
        gives_nones="return [None, None]",
        gives_lists_of_lists="return [[[1.0, 2.0]], [[1.0, 2.0]]]",
        gives_empty_lists="return [[], []]",
        gives_too_many_channels="return [[1.0, 2.0, 3.0], [1.0, 2.0]]",
        gives_a_set="return {1.0, 2.0}",
        gives_bytes="return [b'x', b'y']",
        gives_a_function="return sensitivity",
        gives_a_module="return [math, 1]",
        gives_a_range="return range(2)",
        gives_a_lambda="return [lambda: 1, 1]",
        gives_an_error="return [ValueError('x'), 1]",
        gives_a_type="return [int, float]",
        gives_a_view="return {'a': 1}.values()",
        gives_a_complex_number="return [1j, 2j]",
        gives_keys_that_are_numbers="return {1: 2}",
        gives_keys_that_are_none="return {'a': {None: 2}}",
        gives_keys_that_are_tuples="return {(1,): 2}",
        gives_an_ellipsis="return [..., 1]",
        gives_a_list_in_itself="x = []\nx.append(x)\nreturn x",
        gives_a_dict_in_itself="x = {}\nx['a'] = x\nreturn x",
        gives_levels="x = 0\nfor _ in range(99): x = [x]\nreturn x",
        gives_integers_of_many_digits="return [2**64, 1]",
        gives_a_long_text="return 'x' * 10**6",
        gives_many_numbers="return [0] * 10**5",
        gives_many_lists="return [[]] * 20_000",
        gives_many_dicts="return [{} for _ in range(20_000)]",
        gives_a_list_many_times="x = [0.5] * 99\nreturn [x] * 10_000",
    ),
    *_all(
        (Failure.NOT_FINITE,),
        gives_nan="return [float('nan'), 1.0]",
        gives_infinity="return [1e308 * 10, 1.0]",
        gives_what_overflows_in_the_mean="return [[1e308, 1e308], [1.0, 2.0]]",
    ),
    *_all(
        (Failure.CONSTANT,),
        gives_the_same_to_all="return [1.0 for _ in layers]",
        gives_zeros_of_both_signs="return [0.0, -0.0]",
    ),
]

LOUD = [
    *_all(
        _ERROR,
        raises="raise ValueError('no')",
        raises_nothing_known="return missing",
        raises_terminal_codes="raise ValueError('\\x1b[31m\\x07\\n' * 1000)",
        raises_half_a_surrogate_pair="raise ValueError(chr(0xD800) * 9)",
        raises_from_another="try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError('y' * 10**6) from e",
        raises_many_arguments="raise ValueError(*range(10**5))",
        raises_a_list="raise ValueError([0] * 10**5)",
        raises_a_key="return {}['k' * 5_000_000]",
        fails_in_an_argument="return int('x' * 5_000_000)",
        asserts_a_long_text="assert False, 'z' * 5_000_000",
        fails_far_down="def g(n): return g(n - 1) if n else 1 / 0\nreturn g(50)",
        catches_and_raises_again="try:\n    return layers[9]\nexcept Exception:\n    raise",
        calls_with_too_few="return math.log()",
        calls_what_is_none="return layers[0]['std']()",
        changes_what_it_walks="for name in layers[0]: layers[0][name + 'x'] = 1\nreturn missing",
        takes_a_root_of_less_than_nothing="return [math.sqrt(-1), 1]",
        divides_by_nothing="return [1 / (layer['std'] - layer['std']) for layer in layers]",
    ),
    *_all((Failure.ERROR, Failure.MEMORY), raises_a_long_text="raise ValueError('x' * 25_000_000)"),
    *_all(
        _TIME,
        prints_without_end="while True: print('x' * 1000)",
    ),
]

SHADOWING = _all(
    (*_ERROR, *_SHAPE),
    clears_its_inputs="layers.clear()\ntask.clear()\nreturn []",
    puts_its_inputs_into_the_result="return [layers, task]",
    hides_its_own_name="global sensitivity\nsensitivity = 1\nreturn [sensitivity]",
    hides_the_names_of_the_harness="global _result, _text, _json, json\n_result = _text = _json = json = 1\nreturn {2}",
    hides_a_builtin_by_an_argument="def g(list): return list\nreturn g({1})",
    puts_a_function_into_a_module="math.log = 1\nreturn {3}",
)

UNREADABLE = [
    Snippet(name, body, (), Failure.UNPARSABLE)
    for name, body in {
        "has an open bracket": "return (",
        "holds a null byte": "return '\0'",
        "holds half a surrogate pair": "return '\ud800'",
        "has many signs": "return " + "-" * 19_000 + "1",
        "has many brackets": "return " + "[" * 5_000 + "]" * 5_000,
        "has a long sum": "return " + " + ".join("1" * 2_000),
        "has a long chain": "return x" + ".a" * 9_000,
        "has many levels": "".join(f"{' ' * level}if 1:\n" for level in range(99)) + " " * 99 + "pass",
        "is too long": "return []" + "#" * 20_000,
        "indents by tabs and spaces": "if 1:\n\treturn 1\n        return 2",
    }.items()
]

HOLDING = [
    *_all(_SHAPE, Failure.FORBIDDEN, leaves_it_for_later="async def f(): return 1\nreturn [f(), 1]"),
    *_all(
        _ERROR,
        Failure.FORBIDDEN,
        asks_the_host_again_and_again="while True:\n    try: open('/x' * 10**6)\n    except Exception: pass",
    ),
    *_all(
        _TIME,
        Failure.FORBIDDEN,
        sleeps="import time\ntime.sleep(60)",
        sleeps_in_pieces="import time\nfor _ in range(9): time.sleep(0.2)",
        loops_and_catches_everything="while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ),
]

SNIPPETS = [*REACHING, *HOLDING, *ENDLESS, *GREEDY, *DEEP, *FORMS, *LOUD, *SHADOWING]
