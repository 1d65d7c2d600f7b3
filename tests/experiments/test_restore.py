"""What a restore holds at its peak is watched, and a device holds no more than its part."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import restore


def test_what_a_function_holds_at_its_peak_is_seen():
    """Planted: twice what it gives, for a while; a buffer that two arrays share is held once."""

    def twice():
        first = jax.block_until_ready(jnp.ones((1024, 1024)))
        second = jax.block_until_ready(first + 1)
        shared = jax.make_array_from_single_device_arrays(second.shape, second.sharding, [second])
        restore.time.sleep(0.1)
        return shared

    result, seconds, device, _ = restore.watched(twice)
    assert seconds > 0.1
    assert device == 2 * result.nbytes


def test_what_a_function_gives_is_seen_though_no_sample_fell_on_it(monkeypatch):
    counted = restore.device_bytes

    def starved():
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("never its turn")
        return counted()

    monkeypatch.setattr(restore, "device_bytes", starved)
    result, _, device, _ = restore.watched(lambda: jnp.ones((1024, 1024)))
    assert device == result.nbytes


@pytest.mark.full
def test_a_device_holds_no_more_than_its_part(tmp_path):
    model = dataclasses.replace(restore.model_of(1), d_model=512, d_ff=512, vocab_size=2**14)
    for row in restore.measured(tmp_path, model, {"fsdp:4,tensor:2": 8, "data:2,fsdp:2": 4, "data:1": 1}):
        assert row["part_gb"] <= row["device_gb"] < 1.01 * row["part_gb"], row
        assert row["host_gb"] > 0.5 * row["held_gb"]
