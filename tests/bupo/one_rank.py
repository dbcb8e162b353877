"""One rank of an engine over several: a process of tests/bupo/test_engine_ranks.py."""

import sys

import torch
import torch.distributed as dist
from engines import batch_of, build, group, infer, internal, samples, update, weights
from verl.workers.engine.fsdp.transformer_impl import FSDPModule

__all__ = ["both_phases"]


def both_phases(directory, share, **model):
    """What a rank with this share of the samples reads of pi_l, and the weights step by step."""
    asked = {"use_remove_padding": True, "global_batch_size": len(samples())}
    order = internal(skip_upper_layers=True)
    engine = build(directory, use_remove_padding=True, **model)
    assert isinstance(engine.module, FSDPModule)
    read = infer(engine, batch_of(samples()[share], internal(stride=1), **asked))
    found = [weights(engine)]
    for seed in (1, 2):
        data = batch_of(samples(seed)[share], order, micro_batch_size_per_gpu=1, **asked)
        update(engine, data)
    found.append(weights(engine))
    update(engine, batch_of(samples(3)[share], **asked))
    found.append(weights(engine))
    found.append({name: weight.clone() for name, weight in engine.whole_weights()})
    return read, found


if __name__ == "__main__":
    rank, store, target, *directories = sys.argv[1:]
    torch.set_num_threads(1)
    with group(int(rank), 2, dist.FileStore(store, 2)):
        share = slice(int(rank), None, 2)
        torch.save([both_phases(it, share) for it in directories], f"{target}/{rank}.pt")
