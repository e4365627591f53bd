"""`make bench`: what capture and ablation cost, beside a plain forward pass, stored activations,
nnsight, TransformerLens.

One process, one thread, methods interleaved. CPU seconds, because the machine may be shared, and
for each method the median over the rounds of its ratio to the plain forward pass of the same
round. Weights are random. Peers are measured where they are installed (`make bench-peers`).
`--full`: the paper's shapes on a GPU. `--analysis`: sets, their overlaps and consensus at the
paper's scale, from synthetic counts on disk (6 GB of it, some minutes). `--chain`: what the last
chain of a profile read, from the ledgers beside its executed notebooks.
"""

import argparse
import importlib.util
import os
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # torch's profiler is chatty, and reads this when it is imported

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.analysis.sets import consensus, top_sets
from helpers.analysis.similarity import jaccard_matrix
from helpers.capture import counter as counting
from helpers.capture.budget import lines_of, spent
from helpers.capture.counter import watching
from helpers.capture.counts import Counts, Shards
from helpers.capture.interventions import ablate
from helpers.capture.sites import find_sites
from helpers.capture.tokens import Encoded
from helpers.paths import DATA, results_dir
from helpers.record import UserError, read_json, versions, write_json
from helpers.study.answers import continuations
from tests import zoo

SMALL = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "intermediate_size": 1376,
}
SHAPES = {
    "dense": ("llama", SMALL | {"num_hidden_layers": 6}),
    "moe": (
        "qwen2_moe",
        SMALL
        | {
            "num_hidden_layers": 4,
            "num_experts": 24,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 352,
            "shared_expert_intermediate_size": 512,
        },
    ),
    "llama2-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    "qwen15-moe": (
        "qwen2_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "max_position_embeddings": 8192,
        },
    ),
}


def build(shape, device="cpu", dtype=torch.float32):
    """A random-initialised model of one of SHAPES, in evaluation mode."""
    family, settings = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings), dtype=dtype, trust_remote_code=False
        ).eval()


def token_ids(batch, length):
    """Random token ids [B, T]."""
    return torch.randint(3, 2000, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain(model, *batches):
    """The trunk without hooks: the yardstick."""
    for ids in batches:
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def capture(model, *batches):
    """Ours: neurons, experts and routing."""
    with watching(model) as counter:
        for ids in batches:
            counter(ids)


def opening(model, ids):
    """Putting the hooks on and taking them off, and one token: what a count pays once, however many
    batches follow.
    """
    with watching(model) as counter:
        counter(ids[:1, :1])


def position_groups(ids):
    """All positions, the even ones, the odd ones and the first quarter: [B, 4, T]."""
    at = torch.arange(ids.shape[1], device=ids.device)
    one = torch.stack([at >= 0, at % 2 == 0, at % 2 == 1, at < ids.shape[1] // 4])
    return one.long().expand(len(ids), -1, -1)


def capture_groups(model, *batches):
    """Ours, four position groups in one pass."""
    with watching(model) as counter:
        for ids in batches:
            counter(ids, count_mask=position_groups(ids))


def capture_passes(model, *batches):
    """The same four groups, a pass for each."""
    with watching(model) as counter:
        for ids in batches:
            for group in position_groups(ids).unbind(1):
                counter(ids, count_mask=group)


@torch.no_grad()
def stored(model, ids):
    """Hooks that keep the activations of the MLPs and count afterwards; what is inside experts
    they miss.
    """
    kept, sites = [], [s for s in find_sites(model) if s.act is not None]
    hooks = [s.act.register_forward_hook(lambda module, args, out: kept.append(out)) for s in sites]
    plain(model, ids)
    for hook in hooks:
        hook.remove()
    return [(a.reshape(*ids.shape, -1) > 0).sum(1) for a in kept]


@torch.no_grad()
def whole(model, ids):
    """The whole model, language-model head included."""
    model(input_ids=ids, use_cache=False)


def one_by_one(run, ids):
    """The same on one instruction after the other: what a tool that knows no padding has to do."""
    for row in ids:
        run(row[None])


def nnsight_counting(model):
    """nnsight, counting MLPs inside its trace."""
    import nnsight

    wrapped = nnsight.NNsight(model)

    def run(ids):
        with torch.no_grad(), wrapped.trace(ids):
            counts = nnsight.save([])
            for layer in wrapped.model.layers:
                counts.append((layer.mlp.act_fn.output > 0).sum(1))

    return run


def lens_counting(model):
    """TransformerLens hooks that count a dense model's gate."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        zoo.tokenizer().save_pretrained(folder)
        words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=words, device="cpu"
        )

    def run(ids):
        found = []
        hooks = [
            (f"blocks.{i}.mlp.gate.hook_out", lambda x, hook: found.append((x > 0).sum(1)) and None)
            for i in range(model.config.num_hidden_layers)
        ]
        with torch.no_grad():
            bridge.run_with_hooks(ids, fwd_hooks=hooks)

    return run


def interleaved(methods, rounds, clock=time.process_time) -> dict[str, dict]:
    """Per method the median seconds and the median ratio to "plain" of the same round; the order
    rotates.
    """
    spent, names = {name: [] for name in methods}, list(methods)
    for run in methods.values():
        run()
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = clock()
            methods[name]()
            spent[name].append(clock() - start)
    return {
        name: {
            "seconds": statistics.median(s),
            "ratio": statistics.median(a / b for a, b in zip(s, spent["plain"], strict=True)),
        }
        for name, s in spent.items()
    }


def share_of_hooks(model, ids, rounds) -> float:
    """The part of capture's CPU time that is spent counting; steadier than a ratio of two forward
    passes.
    """
    inside = [0.0]
    names = ("count_positive", "count_masked")
    before = {name: getattr(counting, name) for name in names}

    def timed(count, *args):
        start = time.process_time()
        found = count(*args)
        inside[0] += time.process_time() - start
        return found

    for name, count in before.items():
        setattr(counting, name, partial(timed, count))
    try:
        start = time.process_time()
        for _ in range(rounds):
            capture(model, ids)
        return inside[0] / (time.process_time() - start)
    finally:
        for name, count in before.items():
            setattr(counting, name, count)


def peak(run) -> int:
    """The most bytes allocated at one time while `run` runs, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in trace.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


def memory(model, length) -> dict[str, float]:
    """MiB that capture needs beyond the plain forward pass at T and at 2 T tokens, and that stored
    activations need.
    """
    found = {}
    for factor in (1, 2):
        ids = token_ids(16, factor * length)
        base = peak(partial(plain, model, ids))
        for name, run in (("capture", capture), ("stored", stored)):
            found[f"{name} at {factor * length} tokens"] = (
                peak(partial(run, model, ids)) - base
            ) / 2**20
    return found


def small(rounds, length) -> dict:
    """The table on the CPU: small shapes, 16 instructions in a batch."""
    table = {}
    for shape in ("dense", "moe"):
        model, ids = build(shape), token_ids(16, length)
        methods = {
            "plain": partial(plain, model, ids),
            "capture": partial(capture, model, ids),
            "capture, 4 groups": partial(capture_groups, model, ids),
            "capture, 4 passes": partial(capture_passes, model, ids),
            "stored activations": partial(stored, model, ids),
            "capture, one by one": partial(one_by_one, partial(capture, model), ids),
            "whole model, one by one": partial(one_by_one, partial(whole, model), ids),
        }
        peers = {}
        if shape == "dense" and importlib.util.find_spec("nnsight"):
            peers["nnsight"] = nnsight_counting(model)
        if shape == "dense" and importlib.util.find_spec("transformer_lens"):
            peers["TransformerLens"] = lens_counting(build(shape))
        for name, run in peers.items():
            methods |= {
                name: partial(run, ids),
                f"{name}, one by one": partial(one_by_one, run, ids),
            }
        table[shape] = {
            "methods": interleaved(methods, rounds),
            "hooks": share_of_hooks(model, ids, rounds),
            "extra_mib": memory(model, length),
        }
    return table | {"generation, ablated": ablation(rounds, length)}


def generating(model, ids, new, mask=None, how="auto"):
    """Greedy continuation, `new` tokens of each sequence, with the neurons in the mask set to zero
    all the while.
    """
    rows = [Encoded(tuple(row), (True,) * len(row)) for row in ids.tolist()]
    with ablate(model, mask or {}, "zero", how=how):
        continuations(model, rows, max_new_tokens=new)


def ablation(rounds, length) -> dict:
    """What ablating 5 % of a dense model's neurons costs inside generation: columns set to zero,
    or hooks.
    """
    model, ids = build("dense"), token_ids(16, length // 4)
    model.generation_config.eos_token_id = None
    shape = (model.config.num_hidden_layers, model.config.intermediate_size)
    mask = {"dense": np.random.default_rng(0).random(shape) < 0.05}
    run = partial(generating, model, ids, length // 4)
    return {
        "methods": interleaved(
            {
                "plain": run,
                "zeroed columns": partial(run, mask),
                "zero by hooks": partial(run, mask, "hook"),
            },
            rounds,
        )
    }


def full(rounds, length) -> dict:
    """The table on a GPU: the shapes of Llama-2-7B and Qwen1.5-MoE-A2.7B in bfloat16. Every method
    but "opening" reads eight batches of 32 instructions, behind one opening (a stage of the chain
    reads 38), and keeps no counts.
    """

    def clock():
        torch.cuda.synchronize()
        return time.perf_counter()

    table = {}
    for shape in ("llama2-7b", "qwen15-moe"):
        model = build(shape, "cuda", torch.bfloat16)
        batches = token_ids(8 * 32, length).cuda().split(32)
        rows = interleaved(
            {
                "plain": partial(plain, model, *batches),
                "capture": partial(capture, model, *batches),
                "capture, 4 groups": partial(capture_groups, model, *batches),
                "capture, 4 passes": partial(capture_passes, model, *batches),
                "opening": partial(opening, model, batches[0]),
            },
            rounds,
            clock,
        )
        extra = {}
        for name, run in (("plain", plain), ("capture", capture), ("4 groups", capture_groups)):
            torch.cuda.reset_peak_memory_stats()
            run(model, batches[0])
            extra[name] = (
                torch.cuda.max_memory_allocated() - sum(p.nbytes for p in model.parameters())
            ) / 2**20
        table[shape] = {
            "methods": rows,
            "extra_mib": extra,
            "instructions_per_second": 8 * 32 / rows["capture"]["seconds"],
        }
        del model
    return table


def synthetic(folder, widths, instructions=1200) -> Shards:
    """Counts on disk as capture leaves them: {family: shape of one instruction}; rates differ by
    neuron.
    """
    rng, shards = np.random.default_rng(0), Shards(folder, {"profile": "bench"}, instructions, 64)
    rates = {family: rng.beta(1, 2, shape).astype(np.float32) for family, shape in widths.items()}
    for k in range(len(shards)):
        rows = len(shards.rows(k))
        length = rng.integers(20, 120, rows)
        neurons = {
            family: np.stack(
                [
                    np.minimum(rate * t * (0.5 + rng.random(rate.shape, np.float32)), t).astype(
                        np.uint16
                    )
                    for t in length
                ]
            )
            for family, rate in rates.items()
        }
        layers = {family: tuple(range(shape[0])) for family, shape in widths.items()}
        shards.write(k, Counts(length.astype(np.int32), neurons, None, layers), {})
    return shards


def analysis() -> dict:
    """Seconds and memory of the analysis of 1,200 instructions at the shapes of the paper's
    families.
    """
    table, labels = {}, np.repeat(np.arange(6), 200)
    for shape, widths in (
        ("llama2-7b", {"dense": (32, 11008)}),
        ("qwen15-moe", {"expert": (24, 60, 1408), "shared": (24, 5632)}),
    ):
        with tempfile.TemporaryDirectory(dir=DATA / "results") as folder:
            shards, rows = synthetic(Path(folder), widths), {}

            def timed(name, run, rows=rows):
                wall, cpu = time.perf_counter(), time.process_time()
                found = run()
                rows[name] = {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                }
                return found

            sets, report = timed(
                "top 5 % sets, ties, packed",
                lambda shards=shards, widths=widths: top_sets(
                    [shards.table(family) for family in widths], 0.05, packed=True
                ),
            )
            timed("1,200 x 1,200 Jaccards", lambda sets=sets: jaccard_matrix(sets))
            timed("consensus sets", lambda sets=sets: consensus(sets, labels, 0.5))
        table[shape] = {
            "steps": rows,
            "components": sets.width,
            "packed_mib": sets.bits.nbytes / 2**20,
            "tie_mass": float(report["tie_mass"].mean()),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        }
    return table


def show_analysis(table) -> None:
    """Print the analysis' table."""
    for shape, found in table.items():
        print(
            f"\n{shape}: {found['components']:,} components, "
            f"peak {found['peak_rss_mib']:.0f} MiB of memory"
        )
        for name, row in found["steps"].items():
            print(f"{name:28} {row['seconds']:7.1f} s, {row['cpu_seconds']:7.1f} s of CPU")


def chain(profile: str) -> dict:
    """{"<notebook> <purpose>": what was read there}, then "all" of it: a text that two stages read
    counts once in the last line's minimum, and once in each stage's own.
    """
    ledgers = sorted((results_dir(profile) / "notebooks").glob("*.tokens.jsonl"))
    if not ledgers:
        raise UserError(f"no chain of {profile} has run: make reproduce PROFILE={profile}.")
    read = [line | {"stage": path.name[:2]} for path in ledgers for line in lines_of(path)]
    for line in read:
        line["purpose"] += " (ablated)" if line["altered"] else ""
    stages = spent(read, ("stage", "purpose"))
    table = {" ".join(key): row for key, row in sorted(stages.items())}
    return table | {"all": spent(read, ()).get((), {})}


def show_chain(table) -> None:
    """Print the table of `chain`."""
    heads = ("tokens", "minimum", "ratio", "padding", "seconds")
    print(f"{'notebook, purpose':28}" + "".join(f"{head:>12}" for head in heads))
    for name, row in table.items():
        print(
            f"{name:28}{row['tokens']:12,}{row['minimum']:12,}{row['ratio']:12.2f}"
            f"{row['padding']:12.1%}{row['seconds']:12.1f}"
        )


def show(table) -> None:
    """Print the table; a ratio is to the plain forward pass of the same model and batch."""
    for shape, found in table.items():
        print(f"\n{shape:27} {'seconds':>9} {'ratio':>7}")
        for name, row in found["methods"].items():
            print(f"{name:27} {row['seconds']:9.3f} {row['ratio']:7.3f}")
        if "hooks" in found:
            print(f"counting itself is {found['hooks']:.1%} of capture's CPU time")
        beyond = "the plain forward pass" if "hooks" in found else "the weights"
        for name, size in found.get("extra_mib", {}).items():
            print(f"{name}: {size:+.1f} MiB beyond {beyond}")


def main(argv=None) -> int:
    """Run, print, and write data/results/bench.json (each run replaces its own part of it)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--full", action="store_true", help="the paper's shapes in bfloat16 on a GPU")
    kind.add_argument(
        "--analysis", action="store_true", help="sets, overlaps and consensus at the paper's scale"
    )
    kind.add_argument("--chain", metavar="PROFILE", help="what the profile's last chain has read")
    options = parser.parse_args(argv)
    if options.full and not torch.cuda.is_available():
        print(f"--full needs a GPU, torch {torch.__version__} sees none", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    path = DATA / "results" / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.chain:
        name, table = f"chain {options.chain}", chain(options.chain)
        show_chain(table)
    elif options.analysis:
        name, table = "analysis", analysis()
        show_analysis(table)
    else:
        name = "gpu" if options.full else "cpu"
        table = (full if options.full else small)(options.rounds, options.tokens)
        show(table)
    write_json(
        path,
        (read_json(path) if path.exists() else {})
        | {
            name: {
                "table": table,
                "rounds": options.rounds,
                "tokens": options.tokens,
                "versions": versions(),
            }
        },
    )
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
