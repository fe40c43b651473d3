"""What reaches the terminal: groups of commands, any encoding, a full disk, a closed pipe, an installed copy."""

import os
import shutil
import subprocess
import sys

import pytest

from hat_lib.cli.app import GROUPS, app
from hat_lib.config import REPO, WHY, work_text

GENERATE = ("generate", "--base", "random:tiny", "--capacity", "1", "--max-new-tokens", "4", "--prompt")


def test_help_is_fast_and_shows_a_worked_example(python_m):
    probe = "import sys, hat_lib.cli.app; print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "set()\n"
    done = python_m("hat_lib", "--help")
    assert done.returncode == 0 and done.stdout.startswith(b"Usage: hat ")
    assert b"\n    hat calibrate --save mine " in done.stdout


def test_commands_stand_in_three_groups(run_hat):
    _, out, _ = run_hat("--help")
    blocks = {block.split(":\n")[0]: block.split(":\n")[1] for block in out.split("\n\n") if ":\n" in block}
    assert list(blocks)[-3:] == list(GROUPS) == ["Use", "Train", "Reproduce"]
    for group, commands in GROUPS.items():
        shown = [line.split()[0] for line in blocks[group].splitlines()]
        assert set(shown) >= {command.__name__ for command in commands}
        assert not any("..." in line for line in blocks[group].splitlines()), "each fits its line"
    assert sum(len(blocks[group].splitlines()) for group in GROUPS) == len(app.registered_commands)


@pytest.mark.parametrize("command", [command for commands in GROUPS.values() for command in commands])
def test_every_option_is_explained(run_hat, command):
    code, out, _ = run_hat(command.__name__, "--help")
    options = out.split("Options:\n")[1].split("\n  --")
    assert code == 0 and len(options) > 2
    for option in options:
        assert len(" ".join(option.split()[1:])) > 20, option


def test_sweep_says_how_many_tokens_it_needs(run_hat):
    assert "Tokens of each text, at least 1024" in " ".join(run_hat("sweep", "--help")[1].split())


@pytest.mark.parametrize(
    ("found", "said"), [(0.583, f"0.583 realised ({WHY})"), (0.603, "0.603 realised"), (float("nan"), "nan realised")]
)
def test_a_realised_capacity_says_why_it_is_another(found, said):
    rest = "exit rate 0.00 requested, 0.001 realised; model share 0.700"
    assert work_text(0.6, found, 0.0, 0.001, 0.7) == f"capacity 0.60 requested, {said}; {rest}"


@pytest.mark.parametrize(
    "encoding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_of_ascii_shows_what_it_can(python_m, encoding):
    done = python_m("hat_lib", "calibrate", "--save", "new", "--capacity", "\N{LLAMA}", **encoding)
    assert done.returncode == 2 and done.stderr.startswith(b"error: capacity must be a number in [0.1, 1.0], got ")


@pytest.mark.slow
def test_text_beyond_ascii_goes_to_a_terminal_of_ascii(python_m):
    prompt = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{LLAMA}"
    done = python_m("hat_lib", *GENERATE, prompt, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.startswith(b"caf? ?"), done


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("args", [("--help",), (*GENERATE, "x")])
def test_a_full_disk_is_one_line(python_m, args):
    with open("/dev/full", "w") as full:
        done = python_m("hat_lib", *args, stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("shell", ["{} --help | head -1", "{} --help >&-", "{} generate --prompt - <&-"])
def test_closed_pipes_leave_no_traceback(shell):
    command = shell.format(f'"{sys.executable}" -m hat_lib')
    done = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr == "" or done.stderr == "error: --prompt - reads stdin, which is closed\n"


def test_what_a_message_repeats_cannot_act(run_hat):
    code, _, err = run_hat("evaluate", "--base", "random:tiny", "--capacity", 1, "--text", "\x1b]0;title\x07\nerror: x")
    assert code == 2 and err.count("\n") == 1 and "\x1b" not in err and r"\x1b]0;title\x07" in err


@pytest.fixture(scope="module")
def installed(tmp_path_factory, python_m):
    """A folder with the package as installed by `pip install .`, without the rest of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / name)
    for name in ("hat_lib", "data"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "work"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", folder / "site", folder], capture_output=True, text=True)
    if "BackendUnavailable" in done.stderr or "No module named" in done.stderr:
        pytest.skip("needs pip and setuptools")
    assert done.returncode == 0, done.stderr
    for name in ("hat_lib", "data"):
        shutil.rmtree(folder / name)
    (folder / "elsewhere").mkdir()
    where = {"cwd": folder / "elsewhere", "PYTHONPATH": str(folder / "site")}
    return lambda *args: python_m("hat_lib", *args, **where)


@pytest.mark.slow
def test_an_installed_copy_has_the_reference_checkpoints(installed):
    done = installed(*GENERATE, "x")
    assert done.returncode == 0 and done.stdout.startswith(b"x") and done.stderr == b""
    done = installed("generate", "--prompt", "x", "--base", "random:tiny", "--checkpoint", "default")
    assert done.returncode == 2 and b"was made for bundled" in done.stderr, "found, by name"
    done = installed("batch", "05", "--grid", "seed=0", "--out", "new")
    assert done.returncode == 2 and b"clone of the repository" in done.stderr
