"""Recall: a model trained on associative recall from scratch, until it is solved."""

from dataclasses import replace

from archs.backbone import Model
from archs.backends import AUTO, resolve_backend
from archs.checks import parse
from eval.cell_rows import estimate_row, reporter
from eval.measure.site import Failure, Site, about, spec_of
from eval.progress import Watch
from eval.quality import mqar_accuracy
from eval.results.point import Point
from eval.results.rows import Found, Row, Status
from eval.suite import MqarPlan
from train.loop import train
from train.mqar import MqarBatches

SOLVED = 0.99


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Recall at the end of training, which each learning rate gets until one solves it.

    When to stop and which rate to take is decided on development sequences.
    """
    plan = parse(MqarPlan, point.options, f"the options of {point.key}")
    spec, task = spec_of(point), plan.task
    data = MqarBatches(task, plan.batch, point.seed)
    best: tuple[float, Model, int, float] | None = None
    trained = about(
        spec, spec.outline(), corpus="mqar", kernel_backend=resolve_backend(AUTO, site.device)
    )
    for rate in plan.learning_rates:
        recipe = plan.recipe(rate, point.seed)
        model = site.to_train(spec, recipe)
        result = train(
            model, data, recipe, site.work_folder(point) / f"lr_{rate:g}",
            spec=spec, data_fingerprint=str(task), deadline=site.deadline,
            progress=reporter(watch),
            eval_fn=lambda m: {
                "accuracy": mqar_accuracy(m, task, part="dev", sequences=128, seed=point.seed).value
            },
            enough=lambda found: found.get("accuracy", 0.0) >= SOLVED + 0.003,
        )  # fmt: skip
        if result.status == "stopped":
            raise Failure(Status.ERROR, trained, "stopped", stopped=True)
        if result.status != "ok":
            continue
        chosen_by = mqar_accuracy(
            model.eval(), task, part="dev", sequences=plan.test_sequences, seed=point.seed
        ).value
        if best is None or chosen_by > best[0]:
            best = chosen_by, model, result.steps, rate
        if chosen_by >= SOLVED:
            break
    if best is None:
        raise Failure(Status.NAN, trained, "training failed at every learning rate")
    _, model, steps, rate = best
    accuracy = mqar_accuracy(
        model, task, part="test", sequences=plan.test_sequences, seed=point.seed
    )
    rows = [
        estimate_row("mqar_accuracy", accuracy, context=plan.seq_len),
        Row(measure="learning_rate", value=rate),
    ]
    if accuracy.value >= SOLVED:
        rows.append(Row(measure="mqar_steps_to_99", value=steps))
    return Found(about=replace(trained, tokens=steps * plan.batch * plan.seq_len), rows=tuple(rows))
