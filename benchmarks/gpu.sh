#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine without a network: torch >= 2.11 built for CUDA, Triton, nvcc, pytest,
# hypothesis, pybind11, ninja. Nothing is written but the build folder and RESULTS_DIR.
usage() {
  cat <<'TEXT'
usage: bash benchmarks/gpu.sh [build|test|sanitize|bench|profile|all] [--from STEP] [RESULTS_DIR]

  build     copy the tree to build/gpu and build the native floor with its CUDA kernels there
  test      pytest -m gpu
  sanitize  compute-sanitizer memcheck and racecheck on small batches
  bench     python -m benchmarks.run --device cuda: bench.json and its table
  profile   kernel by kernel, one forward and one forward + backward: profile.json
  all       all of them in this order (the default), or with --from STEP from there on

RESULTS_DIR gets at most 8 files, flat; default: benchmarks/results/<device>/, e.g. h200. A step that needs a build makes
it first where there is none of these sources. A step that is asked for again by --from goes on where it ended.

Variables: ITM_SECONDS      time for all of it (540); no step begins that may take longer than what is left
           ITM_ESTIMATES    what steps take at least, e.g. "build=60 bench=200", in seconds
           ITM_WHEELS       folder of wheels (../wheels): the peers; all that are there are installed
           ITM_COMMIT       the commit that records name, where the tree has no history with it
           ITM_NCU=1        profile with Nsight Compute as well
           ITM_DRY_RUN=1    print the steps and their time, do nothing
           ITM_BUILD_DIR    where to build (build/gpu)
           PYTHON           the interpreter (python3)

Exit code: 0; 1 a step failed; 2 it cannot begin; 75 something is left for want of time; 76 both.
TEXT
}
set -uo pipefail
unset TRITON_INTERPRET # a GPU test that interprets tests no kernel

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT=${ITM_SECONDS:-540}
WHEELS=$(realpath -m "${ITM_WHEELS:-$ROOT/../wheels}")
BUILD=$(realpath -m "${ITM_BUILD_DIR:-$ROOT/build/gpu}")
TREE=$BUILD/tree # a copy: the CUDA library never lands among the sources
SITE=$BUILD/site # what the wheels hold
STEPS=(build test sanitize bench profile)
FILES=(build.log test.log sanitize.log bench.log bench.json profile.log profile.json)
MOST_FILES=8
LATE=75
FAILED_AND_LATE=76
MARGIN=15 # of a step's time, for what it does after its own deadline
SECONDS=0

refuse() {
  echo "gpu.sh: $*" >&2
  exit 2
}

is_step() { [[ " ${STEPS[*]} " == *" $1 "* ]]; }

# What a step takes at least; the steps with a deadline of their own (test, bench) use all that is left.
estimate() {
  local pair
  for pair in ${ITM_ESTIMATES:-}; do
    if [[ ${pair%%=*} == "$1" ]]; then
      echo "${pair#*=}"
      return
    fi
  done
  case $1 in
    build) echo 150 ;;
    test) echo 90 ;;
    sanitize) echo 90 ;;
    bench) echo 90 ;;
    profile) echo 45 ;;
  esac
}

# Runs a command, and ends it with its children when the step's time is over (exit code 124, or 137 where it resisted).
within() {
  local left=$((STEP_END - SECONDS))
  ((left > 0)) || return 124
  timeout --kill-after=5 "$left" "$@"
}

# The same in the copy of the tree.
run_program() { (cd "$TREE" && within "$@"); }
run_python() { run_program "$PYTHON" "$@"; }

# The sources of the build, and what it is made with. Python files are copied anew each time and need no build.
stamp() {
  {
    cd "$ROOT" && find csrc setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    "$PYTHON" -c 'import sys, torch; print(sys.version, torch.__version__)'
    echo "${TORCH_CUDA_ARCH_LIST:-} ${CUDA_HOME:-}"
  } | sha256sum
}

is_built() { [[ -f $BUILD/stamp && $(<"$BUILD/stamp") == "$(stamp)" ]]; }

copy_tree() {
  mkdir -p "$TREE" || return
  # All but what the build left, so that nothing stays that the sources no longer have.
  find "$TREE" -mindepth 1 -maxdepth 1 ! -name build ! -name itm_kernels -exec rm -rf {} +
  if [[ -d $TREE/itm_kernels ]]; then find "$TREE/itm_kernels" -type f ! -name '*.so' -delete; fi
  tar -C "$ROOT" --exclude='./build' --exclude='./runs' --exclude='./.*' --exclude='__pycache__' --exclude='*.so' \
    -cf - . | tar -C "$TREE" -xf -
}

install_wheels() {
  rm -rf "$SITE" && mkdir -p "$SITE"
  local wheels=("$WHEELS"/*.whl)
  if [[ -e ${wheels[0]} ]]; then
    within "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "${wheels[@]}" || return
  fi
  local entry
  for entry in "late_interaction_kernels|late-interaction-kernels, a peer that the benchmark compares with" \
    "flash_maxsim|flash-maxsim, a peer that the benchmark compares with"; do
    run_python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${entry%%|*}') is None)" ||
      echo "missing: ${entry#*|}; its wheel belongs into $WHEELS"
  done
}

step_build() {
  rm -f "$BUILD/stamp" "$BUILD/passed"
  find "$TREE/itm_kernels" -name '*.so' -delete # linked again from the objects that are there
  install_wheels || return
  if ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
    export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
  fi
  run_program env ITM_CUDA=1 "MAX_JOBS=${MAX_JOBS:-$(nproc)}" "$PYTHON" setup.py build_ext --inplace || return
  run_python -c 'import sys; from itm_kernels import native; sys.exit(native.cuda_load_error())' || return
  run_python -m itm_kernels.info # why a floor cannot run, for the log
  stamp >"$BUILD/stamp"
}

step_test() {
  # What passed with these very files does not run again when the step goes on.
  local files
  files=$(cd "$TREE" && find itm_kernels csrc tests -type f ! -name '*.pyc' ! -name '*.so' -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
  if ! $GO_ON || [[ $(head -n 1 "$BUILD/passed" 2>/dev/null) != "$files" ]]; then echo "$files" >"$BUILD/passed"; fi
  # pyproject.toml names options of a plugin that may not be here.
  run_python -m pytest -c pyproject.toml -o addopts= -m gpu -q -ra --strict-markers --continue-on-collection-errors \
    -p benchmarks.gpu_tests "--deadline=$(deadline)" "--passed=$BUILD/passed"
}

step_sanitize() {
  local tool check rc result=0 end=$STEP_END
  tool=$(find_tool compute-sanitizer) || {
    echo "not available: compute-sanitizer is neither on the PATH nor in a wheel (nvidia-cuda-sanitizer-api)"
    return 0
  }
  # The first check leaves half of the time to the second.
  STEP_END=$((SECONDS + (end - SECONDS) / 2))
  for check in memcheck racecheck; do
    echo "== $check"
    # The allocator's cache would hide accesses beyond the end of a tensor.
    run_program env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.sanitize >"$BUILD/sanitize.out" 2>&1
    rc=$?
    tail -n 60 "$BUILD/sanitize.out"
    if ((rc != 0)) && grep -q 'Device not supported' "$BUILD/sanitize.out"; then
      echo "not available: compute-sanitizer does not support this device where it runs"
    elif ((rc != 0)); then
      echo "$check: exit code $rc"
      result=$rc
    fi
    STEP_END=$end
  done
  return "$result"
}

# In order of worth: a run that ends early has the first ones. A line is the options of one run.
bench_runs() {
  cat <<'TEXT'
--direction t2i --dtype bfloat16 --case b128 --case b1024 --case b4096 --without compile --without compile-max-autotune
--direction t2i --dtype bfloat16 --case b512
--direction t2i --dtype bfloat16 --case b2048 --case b8192 --case b16384 --without compile --without compile-max-autotune
--direction i2t --direction both --dtype bfloat16 --without compile --without compile-max-autotune
--dtype float32 --case b128 --case b512 --case b1024 --without compile --without compile-max-autotune
TEXT
}

step_bench() {
  local options rc result=0 failed=false
  $GO_ON || rm -f "$RESULTS/bench.json"
  while read -ra options; do
    (($(deadline) > 0)) || { $failed && return $FAILED_AND_LATE || return $LATE; }
    run_python -m benchmarks.run --device cuda --seconds 3 --json "$RESULTS/bench.json" --resume \
      --deadline "$(deadline)" "${options[@]}" </dev/null
    rc=$?
    case $rc in
      0) ;;
      "$LATE" | 124 | 137) $failed && return $FAILED_AND_LATE || return $LATE ;;
      "$FAILED_AND_LATE") return $FAILED_AND_LATE ;;
      *) failed=true result=$rc ;;
    esac
  done < <(bench_runs)
  return "$result"
}

step_profile() {
  run_python -m benchmarks.profile --json "$RESULTS/profile.json" || return
  [[ ${ITM_NCU:-} == 1 ]] || return 0
  local tool
  tool=$(find_tool ncu) || {
    echo "not available: ncu is not on the PATH"
    return 0
  }
  # The card's clocks are left as they are.
  run_program "$tool" --clock-control none --launch-skip 20 --launch-count 20 --section SpeedOfLight --section Occupancy \
    "$PYTHON" -m benchmarks.profile --bare --method native
}

# Seconds that a program with a deadline of its own may take.
deadline() { echo $((STEP_END - SECONDS - MARGIN)); }

find_tool() {
  local found
  found=$(command -v "$1" || find "$SITE" /usr/local/cuda/bin -name "$1" -type f -perm -u+x -print -quit 2>/dev/null)
  [[ -n $found ]] && echo "$found"
}

# "name folder" of the GPU.
device() {
  "$PYTHON" -c '
import re, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"gpu.sh: needs torch: {error}")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: needs a GPU: torch {torch.__version__} sees none")
name = torch.cuda.get_device_name()
print(re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-"), name, sep="\n")
'
}

command=all from='' results=''
[[ ${1:-} == -h || ${1:-} == --help ]] && usage && exit
if (($#)) && [[ $1 != --from ]]; then
  if is_step "$1" || [[ $1 == all ]]; then
    command=$1 && shift
  elif [[ $1 != */* && ! -d $1 ]]; then
    refuse "there is no step $1; choose one of ${STEPS[*]} all"
  fi
fi
while (($#)); do
  if [[ $1 == --from ]]; then
    (($# > 1)) || refuse "--from needs a step: ${STEPS[*]}"
    from=$2 && shift 2
  elif [[ $1 == -* || -n $results ]]; then
    refuse "$1 is not understood; --help shows what is"
  else
    results=$1 && shift
  fi
done
[[ $LIMIT =~ ^[0-9]+$ ]] || refuse "ITM_SECONDS must be a whole number, got $LIMIT"
[[ $command == all ]] && todo=("${STEPS[@]}") || todo=("$command")
if [[ -n $from ]]; then
  [[ " ${todo[*]} " == *" $from "* ]] || refuse "--from $from: $command has the steps ${todo[*]}"
  while [[ ${todo[0]} != "$from" ]]; do todo=("${todo[@]:1}"); done
fi

DRY=false && [[ ${ITM_DRY_RUN:-} == 1 ]] && DRY=true
if $DRY; then
  RESULTS=${results:-benchmarks/results/DEVICE}
else
  found=$(device) || exit 2
  { read -r folder && read -r name; } <<<"$found"
  RESULTS=${results:-$ROOT/benchmarks/results/$folder}
  mkdir -p "$RESULTS" || refuse "$RESULTS cannot be made"
  RESULTS=$(cd "$RESULTS" && pwd)
  others=$(find "$RESULTS" -mindepth 1 -maxdepth 1 -printf '%f\n' | grep -vxFc "$(printf '%s\n' "${FILES[@]}")")
  ((others + ${#FILES[@]} <= MOST_FILES)) ||
    refuse "$RESULTS holds $others other files; with the ${#FILES[@]} of this script there may be $MOST_FILES"
  ITM_COMMIT=${ITM_COMMIT:-$(git -C "$ROOT" describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)}
  export ITM_COMMIT PYTHONPATH=$TREE:$TREE/python:$SITE PYTHONUNBUFFERED=1
  echo "$name, commit $ITM_COMMIT, results in $RESULTS"
  copy_tree || refuse "the tree cannot be copied to $TREE"
  if [[ ${todo[0]} != build ]] && ! is_built; then
    echo "there is no build of these sources in $BUILD: building first"
    todo=(build "${todo[@]}")
  fi
fi

failed=() left=() planned=0
for index in "${!todo[@]}"; do
  step=${todo[index]}
  $DRY && elapsed=$planned || elapsed=$SECONDS
  least=$(estimate "$step")
  budget=$((LIMIT - elapsed))
  if ((budget < least)); then
    left=("${todo[@]:index}")
    break
  fi
  echo "== $step: takes at least $least s, has $budget of $LIMIT s"
  if $DRY; then
    planned=$((planned + least))
    continue
  fi
  STEP_END=$LIMIT GO_ON=false append=()
  [[ $step == "$from" ]] && GO_ON=true append=(--append)
  began=$SECONDS
  "step_$step" 2>&1 | tee "${append[@]}" "$RESULTS/$step.log"
  rc=${PIPESTATUS[0]}
  echo "== $step: $((SECONDS - began)) s, exit code $rc"
  case $rc in
    0) ;;
    "$LATE" | "$FAILED_AND_LATE" | 124 | 137)
      ((rc == FAILED_AND_LATE)) && failed+=("$step")
      left=("${todo[@]:index}")
      break
      ;;
    *)
      failed+=("$step")
      [[ $step != build ]] || break # nothing else can run
      ;;
  esac
done

((${#failed[@]} == 0)) || echo "failed: ${failed[*]}"
if ((${#left[@]})); then
  echo "left: ${left[*]}"
  printf 'go on: bash benchmarks/gpu.sh %s --from %s %q\n' "$command" "${left[0]}" "$RESULTS"
fi
case $((${#failed[@]} > 0))$((${#left[@]} > 0)) in
  00) exit 0 ;;
  10) exit 1 ;;
  01) exit $LATE ;;
  11) exit $FAILED_AND_LATE ;;
esac
