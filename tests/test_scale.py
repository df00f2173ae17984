"""docs/scale.md says what benchmarks/scale.py and its results say, and the model of a step obeys its own formulas."""

import json
from dataclasses import replace

import pytest
import scale

MEASURED = json.loads(scale.RESULTS.read_text("utf-8"))["measured"]


def test_every_table_of_the_document_is_that_of_the_results() -> None:
    text = scale.DOC.read_text("utf-8")
    shown = scale.tables(MEASURED, scale.cpu_ms())
    for name, table in shown.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text, name
    assert text.count("<!-- ") == 2 * len(shown)
    assert max(len(line) for table in shown.values() for line in table.splitlines()) <= 100


def test_results_hold_what_the_model_assumed() -> None:
    results = json.loads(scale.RESULTS.read_text("utf-8"))
    assert results["assumed"]["gpu"] == vars(scale.A100)
    assert results["assumed"]["cpu_ms_an_image"] == scale.cpu_ms()
    for name, two in MEASURED["two_processes"].items():
        assert results["check"][name] == pytest.approx(scale.check(two))


def test_the_batches_are_those_of_the_headers() -> None:
    for name in scale.recipes():
        header = (scale.HERE.parent / "configs" / f"{name}.yaml").read_text("utf-8")
        assert f" = {scale.GLOBAL_BATCH[name]} images; " in header


def test_an_all_reduce_moves_the_bytes_of_a_ring_in_each_part() -> None:
    cluster = scale.Cluster("", nvlink=100e9, network=10e9, gpus=8, share=1.0, near_us=0.0, far_us=0.0)
    assert cluster.reduce_ms(8, 1e9) == pytest.approx(2 * 7 / 8 * 10)
    assert cluster.reduce_ms(64, 1e9) == pytest.approx(2 * 7 / 8 * 10 + 2 * 7 / 8 * 100)
    assert replace(cluster, near_us=1000.0, far_us=5000.0).reduce_ms(64, 0, calls=3) == pytest.approx(3 * (14 + 30))


def test_synchronised_batch_norm_gathers_one_way_and_reduces_there_and_back() -> None:
    cluster = scale.Cluster("", nvlink=100e9, network=10e9, near_us=1000.0, far_us=0.0)
    gpu = scale.Gpu("", images_per_second=1000.0)
    job = scale.Job(ratio=1.0, teacher=0.0, gradient_bytes=0.0, batch_norms=20, cpu_ms=0.0, workers=8)
    at = scale.step(job, gpu, cluster, 8, 64, synchronised=True)
    assert at.syncbn == pytest.approx(20 * (7 + 14))
    assert at.step == pytest.approx(64 + 20 * (7 + 14))
    assert scale.step(job, gpu, cluster, 1, 64, synchronised=True).step == pytest.approx(64)


def test_a_step_is_its_slowest_part() -> None:
    cluster = scale.Cluster("", nvlink=100e9, network=1e9, share=1.0, near_us=0.0, far_us=0.0)
    gpu = scale.Gpu("", images_per_second=1000.0, launch_ms=10.0)
    job = scale.Job(ratio=1.5, teacher=0.5, gradient_bytes=0.0, batch_norms=20, cpu_ms=1.0, workers=8)
    alone = scale.step(job, gpu, cluster, 1, 64)
    assert alone.compute == alone.step == pytest.approx(64 * 2.0)
    assert scale.step(job, gpu, cluster, 8, 1).compute == pytest.approx(10 * 2.0), (
        "a small batch is launched no quicker"
    )
    assert scale.step(replace(job, cpu_ms=80.0), gpu, cluster, 8, 64).step == pytest.approx(640.0)
    hidden = 2 / 3 * 64 * 1.5
    large = scale.step(replace(job, gradient_bytes=1e8), gpu, cluster, 16, 64)
    assert large.reduce == pytest.approx(2 * 7 / 8 * 1 + 2 * 1 / 2 * 100)
    assert large.exposed == pytest.approx(large.reduce - hidden)
    assert large.step == pytest.approx(128 + large.exposed)
