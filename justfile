# Every developer command, one word each. Bare `just` is what CI runs.

# lint, types and tests
default: lint types test

# the main job, resumable: `just run --limit 40`
run *ARGS:
    harness run {{ARGS}}

# all tests, a file at a time on every core: no network, no GPU
test *ARGS:
    python -m pytest -n auto --dist loadfile {{ARGS}}

# the tests that take seconds
test-fast *ARGS:
    python -m pytest -m "not slow" {{ARGS}}

# style, unused code, and which module may import which
lint:
    ruff check .
    ruff format --check .
    lint-imports

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

# fast path against naive path, as ratios
bench *ARGS:
    harness bench {{ARGS}}

# train the bundled demo model again (about 15 minutes on 2 cores)
demo *ARGS:
    python data/models/train_demo.py {{ARGS}}

# resolve the newest versions into requirements.lock
lock:
    rm -rf .lock-venv
    python3 -m venv .lock-venv
    .lock-venv/bin/pip install --quiet "torch==2.13.0" ".[dev]"
    { sed -n '/^#/p' requirements.lock; .lock-venv/bin/pip freeze --exclude harness | sed 's/+cpu$//'; } > requirements.lock.new
    mv requirements.lock.new requirements.lock
    rm -rf .lock-venv build harness.egg-info

# the image: `just docker`, then `docker run --gpus all -v $PWD/runs:/runs harness run`
docker *ARGS:
    docker build -f docker/Dockerfile -t harness --build-arg REVISION=$(git rev-parse HEAD) {{ARGS}} .

# a made-up run of any size to look at, without a model: `just synthetic --prompts 2500 --layers 28 --heads 28 --to runs`
synthetic *ARGS:
    python -m tests.synthetic {{ARGS}}

# the review app, on http://127.0.0.1:8501
app *ARGS:
    harness app {{ARGS}}
