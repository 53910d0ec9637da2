"""``benchmarks/gpu.sh`` without a GPU: a Python that only notes what it is asked for stands in for the real one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
Session = Callable[..., tuple[int, str]]
STEPS = ["build", "test", "sanitize", "bench", "profile"]
MOST_FILES = 8

# What it does for a step stands in the variable of that name, as shell code.
PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$FAKE_LOG"
result_of() { while (($#)); do [[ $1 == --json ]] && echo "$2"; shift; done; }
case "$*" in
  *get_device_name*) [[ -z ${NO_GPU:-} ]] || { echo "gpu.sh: needs a GPU" >&2; exit 1; }
                     printf 'h200\nNVIDIA H200\n' ;;
  *find_spec*) exit 1 ;;
  "setup.py "*) echo "ITM_CUDA=$ITM_CUDA in $PWD"; eval "${FAKE_BUILD:-}" ;;
  "-m pytest "*) eval "${FAKE_TEST:-}" ;;
  "-m benchmarks.run "*) echo >>"$(result_of "$@")"; eval "${FAKE_BENCH:-}" ;;
  "-m benchmarks.profile "*) echo '[]' >"$(result_of "$@")"; eval "${FAKE_PROFILE:-}" ;;
  "-m benchmarks.sanitize"*) eval "${FAKE_SANITIZE:-}" ;;
esac
"""
SANITIZER = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift 2; done\nexec "$@"\n'

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


class Machine:
    """A folder of stand-ins, and what they were asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.results, self.log = path, path / "results", path / "log"
        (path / "bin").mkdir()
        self.add("python", PYTHON)
        self.add("nvcc", "#!/bin/sh\n")

    def add(self, name: str, text: str) -> None:
        program = self.path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)

    def run(self, *args: str, results: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ITM_")},
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": "python",
            "FAKE_LOG": str(self.log),
            "ITM_BUILD_DIR": str(self.path / "gpu"),
            "ITM_WHEELS": str(self.path / "wheels"),
            **variables,
        }
        return subprocess.run(
            ["bash", str(SCRIPT), *args, *([str(self.results)] if results else [])],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def asked_for(self) -> str:
        return self.log.read_text()


@pytest.fixture
def gpu(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def begun(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^== (\w+): takes", done.stdout, re.MULTILINE)


def test_it_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, check=False).returncode == 0
    checker = shutil.which("shellcheck")
    if checker:
        assert subprocess.run([checker, str(SCRIPT)], check=False).returncode == 0


def test_without_a_gpu_it_ends_before_anything_is_made(gpu: Machine) -> None:
    done = gpu.run("all", NO_GPU="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "gpu.sh: needs a GPU\n")
    assert not gpu.results.exists()
    assert not (gpu.path / "gpu").exists()


def test_all_steps_in_order_and_their_files(gpu: Machine) -> None:
    gpu.add("compute-sanitizer", SANITIZER)
    done = gpu.run("all", FAKE_TEST='echo "3 passed"', FAKE_BENCH='echo "a table"')
    assert done.returncode == 0, done.stdout + done.stderr
    assert begun(done) == STEPS
    tree = gpu.path / "gpu" / "tree"
    assert f"ITM_CUDA=1 in {tree}" in (gpu.results / "build.log").read_text()
    assert (tree / "itm_kernels" / "__init__.py").is_file()
    assert not (tree / ".git").exists()
    assert "3 passed" in (gpu.results / "test.log").read_text()
    assert "a table" in (gpu.results / "bench.log").read_text()
    assert [check for check in ("memcheck", "racecheck") if f"== {check}" in (gpu.results / "sanitize.log").read_text()]
    files = list(gpu.results.iterdir())
    assert all(file.is_file() for file in files)
    assert len(files) <= MOST_FILES
    assert {"bench.json", "profile.json"} <= {file.name for file in files}
    assert gpu.asked_for().count("-m benchmarks.sanitize") == 2


def test_it_names_the_wheels_that_are_missing(gpu: Machine) -> None:
    done = gpu.run("build")
    for name in ("late-interaction-kernels", "flash-maxsim"):
        assert re.search(rf"missing: {name}, .*{gpu.path / 'wheels'}", done.stdout)
    (gpu.path / "wheels").mkdir()
    (gpu.path / "wheels" / "peer-1-py3-none-any.whl").touch()
    gpu.run("build")
    assert re.search(r"-m pip install .*--no-index .*peer-1-py3-none-any\.whl", gpu.asked_for())


def test_the_results_folder_defaults_to_the_device(gpu: Machine) -> None:
    done = gpu.run("all", results=False, ITM_SECONDS="0")  # nothing has time to run
    folder = ROOT / "benchmarks" / "results" / "h200"
    try:
        assert f"results in {folder}\n" in done.stdout
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


@pytest.mark.parametrize("step", STEPS)
def test_one_step_builds_first_where_nothing_is_built(gpu: Machine, step: str) -> None:
    first = gpu.run(step)
    assert begun(first) == ["build", step][step == "build" :]
    assert ("building first" in first.stdout) == (step != "build")
    assert begun(gpu.run(step)) == [step]  # the build is there


def test_from_a_step_on(gpu: Machine) -> None:
    gpu.run("build")
    assert begun(gpu.run("--from", "sanitize")) == STEPS[2:]
    assert begun(gpu.run("all", "--from", "profile")) == ["profile"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["buidl"], "there is no step buidl; choose one of build test sanitize bench profile all"),
        (["all", "--from", "bench2"], "--from bench2: all has the steps build test sanitize bench profile"),
        (["bench", "--from", "test"], "--from test: bench has the steps bench"),
        (["all", "--fast"], "--fast is not understood"),
        (["all", "--from"], "--from needs a step"),
    ],
)
def test_it_refuses(gpu: Machine, args: list[str], message: str) -> None:
    done = gpu.run(*args, results=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not gpu.asked_for()


def test_a_dry_run_prints_the_plan_and_does_nothing(gpu: Machine) -> None:
    done = gpu.run("all", ITM_DRY_RUN="1", ITM_SECONDS="100", ITM_ESTIMATES="build=60 test=30 sanitize=11")
    assert done.returncode == 75
    assert done.stdout == (
        "== build: takes at least 60 s, has 100 of 100 s\n"
        "== test: takes at least 30 s, has 40 of 100 s\n"
        "left: sanitize bench profile\n"
        f"go on: bash benchmarks/gpu.sh all --from sanitize {gpu.results}\n"
    )
    assert not gpu.asked_for()
    assert not gpu.results.exists()


def test_no_step_begins_that_has_no_time(gpu: Machine) -> None:
    estimates = "build=1 test=1 sanitize=1 bench=60 profile=1"
    done = gpu.run("all", ITM_SECONDS="50", ITM_ESTIMATES=estimates)
    assert done.returncode == 75
    assert begun(done) == ["build", "test", "sanitize"]
    assert "left: bench profile\n" in done.stdout
    assert f"go on: bash benchmarks/gpu.sh all --from bench {gpu.results}\n" in done.stdout


def test_a_step_is_ended_when_its_time_is_over(gpu: Machine) -> None:
    estimates = " ".join(f"{step}=1" for step in STEPS)
    gpu.run("build")
    done = gpu.run("test", ITM_SECONDS="3", ITM_ESTIMATES=estimates, FAKE_TEST="echo begun; sleep 30; echo never")
    assert done.returncode == 75
    assert (gpu.results / "test.log").read_text() == "begun\n"
    assert f"left: test\ngo on: bash benchmarks/gpu.sh test --from test {gpu.results}\n" in done.stdout


def test_steps_know_when_to_end_themselves(gpu: Machine) -> None:
    gpu.run("build")
    for step, module in {"test": "pytest", "bench": "benchmarks.run"}.items():
        gpu.run(step, ITM_SECONDS="200")
        deadlines = re.findall(rf"-m {module} .*--deadline[ =](\d+)", gpu.asked_for())
        assert deadlines
        assert all(100 < int(deadline) < 200 for deadline in deadlines)


@pytest.mark.parametrize(
    ("variables", "code", "failed", "left"),
    [
        ({"FAKE_BUILD": "exit 1"}, 1, "build", None),
        ({"FAKE_TEST": "exit 1"}, 1, "test", None),
        ({"FAKE_TEST": "exit 1", "FAKE_PROFILE": "exit 3"}, 1, "test profile", None),
        ({"FAKE_BENCH": "exit 1"}, 1, "bench", None),
        ({"FAKE_TEST": "exit 75"}, 75, None, "test sanitize bench profile"),
        ({"FAKE_TEST": "exit 76"}, 76, "test", "test sanitize bench profile"),
        ({"FAKE_BENCH": "exit 75"}, 75, None, "bench profile"),
        ({"FAKE_TEST": "exit 1", "FAKE_BENCH": "exit 75"}, 76, "test", "bench profile"),
        # Of the runs of a benchmark, the first fails and the second has no time.
        ({"FAKE_BENCH": 'exit $((75 - 74 * ($(wc -l <"$(result_of "$@")") == 1)))'}, 76, "bench", "bench profile"),
    ],
)
def test_exit_codes(gpu: Machine, variables: dict[str, str], code: int, failed: str | None, left: str | None) -> None:
    done = gpu.run("all", **variables)
    assert done.returncode == code, done.stdout
    for name, steps in {"failed": failed, "left": left}.items():
        found = re.findall(rf"^{name}: (.*)$", done.stdout, re.MULTILINE)
        assert found == ([] if steps is None else [steps])
    if failed == "build":
        assert begun(done) == ["build"]


def test_a_benchmark_begins_anew_and_goes_on_when_asked(gpu: Machine) -> None:
    gpu.run("bench")
    lines = len((gpu.results / "bench.json").read_text())
    gpu.run("bench")
    assert len((gpu.results / "bench.json").read_text()) == lines
    gpu.run("bench", "--from", "bench", FAKE_BENCH="echo more")
    assert len((gpu.results / "bench.json").read_text()) == 2 * lines
    assert all("--resume" in line for line in gpu.asked_for().splitlines() if "benchmarks.run" in line)


def test_sanitize_says_why_it_is_not_available(gpu: Machine) -> None:
    done = gpu.run("sanitize", PATH=f"{gpu.path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 0
    assert "not available: compute-sanitizer is neither on the PATH nor in a wheel" in done.stdout
    gpu.add("compute-sanitizer", "#!/bin/sh\necho Device not supported\nexit 1\n")
    done = gpu.run("sanitize")
    assert "not available: compute-sanitizer does not support this device" in done.stdout
    assert done.returncode == 0


def test_sanitize_fails_on_what_it_finds(gpu: Machine) -> None:
    gpu.add("compute-sanitizer", SANITIZER)
    done = gpu.run("sanitize", FAKE_SANITIZE="echo 3 errors; exit 9")
    assert done.returncode == 1
    assert "3 errors" in (gpu.results / "sanitize.log").read_text()


def test_the_results_folder_has_room(gpu: Machine) -> None:
    gpu.results.mkdir()
    (gpu.results / "notes").touch()
    assert gpu.run("build").returncode == 0
    (gpu.results / "more").touch()
    done = gpu.run("build")
    assert done.returncode == 2
    assert "holds 2 other files" in done.stderr


def test_a_new_source_is_built(gpu: Machine) -> None:
    gpu.run("build")
    (gpu.path / "gpu" / "stamp").write_text("of other sources")
    assert begun(gpu.run("profile")) == ["build", "profile"]


def test_nsight_compute_on_request(gpu: Machine) -> None:
    gpu.add("ncu", '#!/bin/sh\necho "ncu $*"\n')
    assert "ncu" not in gpu.run("profile").stdout
    assert "ncu --clock-control none" in gpu.run("profile", ITM_NCU="1").stdout


# the tests that it runs

SOME_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(4))
def test_some(n, request):
    assert n != int(request.config.getini("fails"))

def test_without_a_gpu():
    raise AssertionError("not selected")
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -m gpu\nfails = -1\n")
    (tmp_path / "conftest.py").write_text('def pytest_addoption(parser):\n    parser.addini("fails", "")\n')

    def run(seconds: float, fails: int = -1) -> tuple[int, str]:
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider"),
            *(f"--deadline={seconds}", f"--passed={tmp_path / 'passed'}", "-o", f"fails={fails}"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return run


def test_tests_end_in_time_and_go_on(session: Session) -> None:
    # Each session gets one test further at least, however late it is.
    code, told = session(1e-9)
    assert code == 75, told
    assert "1 passed, 1 deselected" in told
    code, told = session(1e-9)
    assert code == 75, told
    assert "1 passed, 2 deselected" in told
    code, told = session(60)
    assert code == 0, told
    assert "2 passed, 3 deselected" in told
    code, told = session(60)
    assert code == 0, told
    assert "5 deselected" in told


def test_tests_that_fail_run_again(session: Session) -> None:
    assert session(1e-9, fails=0)[0] == 76
    assert session(60, fails=0)[0] == 1
    code, told = session(60)
    assert code == 0, told
    assert "1 passed, 4 deselected" in told
