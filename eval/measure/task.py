"""Train a model on a synthetic task until it solves it, then score its answers."""

from dataclasses import dataclass, replace

from archs.backbone import Model
from archs.backends import AUTO, resolve_backend
from archs.checks import parse
from archs.registry import ModelSpec
from eval.measure.cell_rows import estimate_row, reporter
from eval.measure.progress import Watch
from eval.measure.site import Failure, Site, about, spec_of
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Status
from eval.results.statistics import Estimate
from eval.tasks import task_named
from eval.tasks.score import accuracy
from eval.tasks.task import Split, Task, TaskBatches
from train.loop import train

SOLVED = 0.99
#: Development sequences that are scored during training.
ON_THE_WAY = 128


@dataclass(frozen=True, slots=True)
class Taught:
    """A model at the end of its training on a task, after so many steps at a learning rate."""

    task: Task
    spec: ModelSpec
    model: Model
    steps: int
    rate: float
    about: About


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Accuracy after training."""
    taught = teach(point, site, watch)
    task = taught.task

    def answered(task: Task) -> Estimate:
        return accuracy(
            taught.model, task, split="test", sequences=task.test_sequences, seed=point.seed
        )

    found = answered(task)
    rows = [
        estimate_row("accuracy", found, context=task.seq_len),
        Row(measure="learning_rate", value=taught.rate),
    ]
    if (longer := task.beyond()) is not None:
        rows.append(estimate_row("accuracy_beyond", answered(longer), context=longer.seq_len))
    if found.value >= SOLVED:
        rows.append(Row(measure="steps_to_99", value=taught.steps))
    return Found(about=taught.about, rows=tuple(rows))


def teach(point: Point, site: Site, watch: Watch) -> Taught:
    """Train, or take up what was trained; the learning rates are tried until one solves the task.

    Development sequences decide when training stops and which rate is taken. Raises Failure where
    training fails at every rate.
    """
    kind = task_named(point.scale)
    task = parse(kind, point.options, f"the options of {point.key}")
    spec, data = spec_of(point), TaskBatches(task, point.seed)

    def right(model: Model, split: Split, sequences: int) -> float:
        """Of longer sequences, too, where they are asked: the lower share of the two."""
        return min(
            accuracy(model, asked, split=split, sequences=sequences, seed=point.seed).value
            for asked in (task, task.beyond())
            if asked is not None
        )

    best: tuple[float, Model, int, float] | None = None
    trained = about(
        spec, spec.outline(), corpus=task.NAME, options=task.asked,
        kernel_backend=resolve_backend(AUTO, site.device),
    )  # fmt: skip
    for rate in task.learning_rates:
        recipe = task.recipe(rate, point.seed)
        model = site.to_train(spec, recipe)
        result = train(
            model, data, recipe, site.work_folder(point) / f"lr_{rate:g}",
            spec=spec, data_fingerprint=task.fingerprint, deadline=site.deadline,
            progress=reporter(watch),
            eval_fn=lambda m: {"accuracy": right(m, "dev", ON_THE_WAY)},
            enough=lambda found: found.get("accuracy", 0.0) >= SOLVED + 0.003,
        )  # fmt: skip
        if result.status == "stopped":
            raise Failure(Status.ERROR, trained, "stopped", stopped=True)
        if result.status != "ok":
            continue
        chosen_by = right(model.eval(), "dev", task.test_sequences)
        if best is None or chosen_by > best[0]:
            best = chosen_by, model, result.steps, rate
        if chosen_by >= SOLVED:
            break
    if best is None:
        raise Failure(Status.NAN, trained, "training failed at every learning rate")
    _, model, steps, rate = best
    tokens = steps * task.batch * task.seq_len
    return Taught(task, spec, model, steps, rate, replace(trained, tokens=tokens))
