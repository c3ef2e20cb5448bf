"""Fine-tuning and sentence vectors: one loop for every head.

vectors            sentences -> mean-pooled states, without training (retrieval, cosine STS)
fit                one training run: examples in an order that only the seed decides, best dev state kept
predict            outputs of the head, the same whatever the batch size

A Task (ner.Tagging, nli.Classification, qa.Spans, sts.Similarity) says what the sequences are, what the head
reads, and how outputs become scores.

A training batch is BATCH examples, not a number of tokens, so that models with different tokenizers see the
same batches; a token budget then cuts it into micro-batches, which changes nothing but memory.
"""
import abc
import contextlib
import copy
import dataclasses
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import BOS, EOS, UNK, encode_text
from launch import keep_freed_memory
from unibert import UniBERT, mean_pool

BATCH = 32                # examples a step
SMALL = 8                 # the same where a budget does not hold all steps with BATCH: steps count for more than examples
WARMUP = 0.1              # of the steps; then the learning rate falls linearly to 0
DROPOUT = 0.1
CHECKS = 8                # looks at the dev score in a run
PATIENCE = 4              # looks without a better one before a run ends
REACH = 0.1               # learning rate times steps, where a budget leaves one rate: so far Adam may move a weight
TESTING = 0.3             # of a budget at most, for scoring the test splits


# ---- sequences ----------------------------------------------------------------------------------------------

@dataclass
class Item:
    """One sequence. ids [n] int64 with <s> and </s>; rows: the positions whose states the head reads, or None
    for their mean; targets: ints or floats, as the task's loss wants them; example: which example it is of."""
    ids: np.ndarray
    example: int
    rows: np.ndarray | None = None
    targets: tuple = ()


@dataclass
class Batch:
    """Packed items: tokens [T], cu_seqlens [S+1], rows [R] in 0..T-1 or None, counts (rows of each item)."""
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows: torch.Tensor | None
    counts: list
    targets: torch.Tensor


def collate(items, device):
    """[Item] -> Batch; targets are one flat tensor."""
    starts = np.cumsum([0] + [len(item.ids) for item in items])
    rows = None
    if items[0].rows is not None:
        rows = torch.from_numpy(np.concatenate([item.rows + start for item, start in zip(items, starts)])).to(device)
    return Batch(torch.from_numpy(np.concatenate([item.ids for item in items])).to(device),
                 torch.from_numpy(starts.astype(np.int32)).to(device), int(np.diff(starts).max()), rows,
                 [1 if item.rows is None else len(item.rows) for item in items],
                 torch.tensor([t for item in items for t in item.targets], device=device))


def micro_batches(groups, tokens):
    """Groups of items (one group an example) -> lists of items with at most `tokens` ids each, where a group fits."""
    batch, used = [], 0
    for group in groups:
        size = sum(len(item.ids) for item in group)
        if batch and used + size > tokens:
            yield batch
            batch, used = [], 0
        batch, used = batch + group, used + size
    if batch:
        yield batch


def by_example(items, count):
    """Items -> `count` lists, one an example."""
    groups = [[] for _ in range(count)]
    for item in items:
        groups[item.example].append(item)
    return groups


def sequence(pieces, limit):
    """Piece ids -> <s> pieces </s> as int64, cut at `limit`; a text without any piece is one <unk>."""
    return np.array([BOS, *(pieces or [UNK])[:limit - 2], EOS], dtype=np.int64)


class Task(abc.ABC):
    """What a task module gives to the loop, as its HEAD. Python refuses one that leaves an abstract method out."""
    epochs: int               # over the training data
    metric: str               # the name of `score`
    column_names: tuple       # of `columns`
    also = ()                 # (name, function of the columns) of further scores, which `show` prints
    longest = 128             # ids of a sequence at most
    outputs = 0               # width of the linear head; 0: no head, the states themselves

    def __init__(self, tokenizer, max_length, train=(), prefix=""):
        """train: the examples to learn from, which may decide `outputs`; prefix: before each sentence, where the model's
        sentence vectors are compared."""
        self.tokenizer, self.limit, self.prefix = tokenizer, min(max_length, self.longest), prefix

    @staticmethod
    def mismatch(train, examples):
        """Why examples cannot be scored after training on `train`, in words, or None."""

    def target(self, name, language, examples):
        """The task as `language` of data set `name` is scored, and a note for the report, or None. A copy where that is
        another one: dev is scored as before. examples: all that the data set has, in every language."""
        return self, None

    @abc.abstractmethod
    def items(self, examples, learn=False):
        """Examples -> [Item], in their order; learn: for training."""

    @abc.abstractmethod
    def loss(self, outputs, batch):
        """outputs [R, outputs] float32 -> (sum of losses, how many are in it)."""

    @abc.abstractmethod
    def columns(self, examples, items, outputs):
        """`predict`'s outputs -> float64 [examples, columns], what statistics.Cell resamples."""

    @staticmethod
    @abc.abstractmethod
    def score(*columns, weights=None):
        """The score of such columns, as in metrics.py; higher is better."""


# ---- precision ----------------------------------------------------------------------------------------------

def precision(device, dtype):
    """Context in which matrix products are in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


# ---- sentence vectors ---------------------------------------------------------------------------------------

def vectors(model, tokenizer, sentences, tokens=8192, dtype=torch.float32, layers=False):
    """Sentences -> their mean-pooled last states, float32 [n, H]; with `layers` [L + 1, n, H], the embeddings first.

    Longer sentences are cut at the model's max_length; a sentence that occurs twice is encoded once.
    """
    unique = list(dict.fromkeys(sentences))
    items = [Item(sequence(encode_text(tokenizer, s), model.config.max_length), i) for i, s in enumerate(unique)]
    net = Net(model, 0, all_layers=layers)
    found = np.stack(predict(net, items, tokens, dtype))
    index = {s: i for i, s in enumerate(unique)}
    found = found[[index[s] for s in sentences]]                        # [n, 1 or L + 1, H]
    return found.transpose(1, 0, 2) if layers else found[:, 0]


# ---- model and head -----------------------------------------------------------------------------------------

class Net(nn.Module):
    """Encoder and a linear head on the states it reads; the states themselves where `outputs` is 0."""

    def __init__(self, encoder, outputs, all_layers=False):
        super().__init__()
        self.encoder, self.all_layers = encoder, all_layers
        self.head = nn.Linear(encoder.config.hidden_size, outputs) if outputs else nn.Identity()
        if outputs:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """Batch -> float32 [R, outputs], an item's rows one after the other (one row where it is pooled)."""
        packed = (batch.tokens, batch.cu_seqlens, batch.max_seqlen)
        if self.all_layers:
            states = []
            last = self.encoder.encode(*packed, states=states)
            states[-1] = last                                            # after the final norm, as everyone uses it
            return torch.stack([mean_pool(x, batch.cu_seqlens) for x in states], 1).flatten(0, 1)
        hidden = self.encoder.encode(*packed)
        read = mean_pool(hidden, batch.cu_seqlens) if batch.rows is None else hidden[batch.rows]
        return self.head(F.dropout(read, DROPOUT, self.training and isinstance(self.head, nn.Linear))).float()


def compact(model, learnt, scored=()):
    """(encoder, rest): a copy with only the embedding rows that the items of the lists `learnt` use, and the rows [R, H]
    that only those of `scored` use, for `extend`. The items' ids are renumbered in place.

    Exact: a row that no sequence uses has no gradient. It makes a step with a large vocabulary several times
    cheaper. The copy has dropout for training and no MLM head.
    """
    used = np.unique(np.concatenate([item.ids for items in learnt for item in items]))
    rest = np.setdiff1d(np.concatenate([item.ids for items in scored for item in items] or [used]), used)
    renumber = np.full(model.config.vocab_size, -1, dtype=np.int64)
    renumber[np.concatenate([used, rest])] = np.arange(len(used) + len(rest))
    for items in (*learnt, *scored):
        for item in items:
            item.ids = renumber[item.ids]
    small = UniBERT(dataclasses.replace(model.config, vocab_size=len(used), mlm_head=False, dropout=DROPOUT))
    weights = {k: v for k, v in model.state_dict().items() if k in small.state_dict()}
    table = model.embedding.weight.detach()
    weights["embedding.weight"], rest = (table[torch.from_numpy(ids).to(table.device)] for ids in (used, rest))
    small.load_state_dict(weights)
    return small.to(table.device).eval(), rest


def extend(net, rest):
    """Give a trained net the rows that `compact` left out, so that it reads what is to be scored."""
    net.encoder.embedding.weight = nn.Parameter(torch.cat([net.encoder.embedding.weight.detach(), rest]))


@torch.no_grad()
def predict(net, items, tokens=8192, dtype=torch.float32):
    """Outputs of every item, in order: a list of float32 arrays [rows, outputs]. `tokens` bounds a batch."""
    net.eval()
    device = net.encoder.embedding.weight.device
    order = sorted(range(len(items)), key=lambda i: -len(items[i].ids))
    results = [None] * len(items)
    start = 0
    for batch in micro_batches([[items[i]] for i in order], tokens):
        with precision(device, dtype):
            out = net(collate(batch, device)).cpu().numpy()
        sizes = [len(out) // len(batch)] * len(batch) if batch[0].rows is None else [len(item.rows) for item in batch]
        for i, part in zip(order[start:start + len(batch)], np.split(out, np.cumsum(sizes)[:-1])):
            results[i] = part
        start += len(batch)
    return results


# ---- the loop -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    """What one training run gave. dev: the best dev score; steps: done; net: at its best dev score."""
    net: Net
    lr: float
    seed: int
    dev: float
    steps: int
    seconds: float
    stopped: str            # "end", "early" (dev score), "budget"


def orders(count, steps, seed, batch=BATCH):
    """Indices of the examples of each step: epoch after epoch, each shuffled, a function of (count, seed) alone."""
    queue, epoch = np.empty(0, dtype=np.int64), 0
    size = min(batch, count)
    for _ in range(steps):
        while len(queue) < size:
            queue = np.concatenate([queue, np.random.default_rng([seed, epoch]).permutation(count)])
            epoch += 1
        yield queue[:size]
        queue = queue[size:]


def fit(encoder, task, train, dev, lr, seed, steps, batch=BATCH, tokens=8192, dtype=torch.float32, deadline=float("inf")):
    """Train a copy of `encoder` with a fresh head -> Run.

    train, dev: (examples, items). AdamW, linear warm-up and decay, gradient norm at most 1. CHECKS times a run,
    and at its end, the dev score is taken and the best state kept; PATIENCE looks without a better one, or
    time.monotonic() past `deadline`, end it. dev may be None: the last state counts.
    """
    began = time.monotonic()
    device = encoder.embedding.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = Net(copy.deepcopy(encoder), task.outputs).to(device)
        decayed = [p for name, p in net.named_parameters() if p.ndim > 1 and "embedding" not in name]
        rest = [p for name, p in net.named_parameters() if p.ndim <= 1 or "embedding" in name]
        optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.01), dict(params=rest, weight_decay=0.0)],
                                      lr=lr, betas=(0.9, 0.98), fused=True)
        groups = by_example(train[1], len(train[0]))
        every = max(1, -(-steps // CHECKS))
        best, best_state, since, done, stopped = -np.inf, None, 0, 0, "end"
        for step, chosen in enumerate(orders(len(groups), steps, seed, batch)):
            if time.monotonic() > deadline:
                stopped = "budget"
                break
            warm = max(1, round(WARMUP * steps))
            rate = lr * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
            for group in optimizer.param_groups:
                group["lr"] = rate
            _train_step(net, task, [groups[i] for i in chosen], optimizer, tokens, dtype, device)
            done = step + 1
            if dev is not None and (done % every == 0 or done == steps):
                score = evaluate(net, task, *dev, tokens, dtype)[0]
                since = 0 if score > best or best <= 0 else since + 1    # 0: nothing learnt yet, which is no plateau
                if score > best:
                    best, best_state = score, {k: v.clone() for k, v in net.state_dict().items()}
                if since >= PATIENCE:
                    stopped = "early"
                    break
        if dev is not None and best_state is None:       # the budget ended before the first look
            best = evaluate(net, task, *dev, tokens, dtype)[0]
        elif best_state is not None:
            net.load_state_dict(best_state)
    return Run(net.eval(), lr, seed, float(best), done, time.monotonic() - began, stopped)


def _train_step(net, task, groups, optimizer, tokens, dtype, device):
    """One update over the examples `groups`; every micro-batch is weighted by its share of the loss terms."""
    net.train()
    optimizer.zero_grad(set_to_none=True)
    total = 0
    for items in micro_batches([group for group in groups if group], tokens):
        batch = collate(items, device)
        with precision(device, dtype):
            outputs = net(batch)
        loss, count = task.loss(outputs, batch)
        loss.backward()
        total += count
    if total:
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad /= total
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def evaluate(net, task, examples, items, tokens=8192, dtype=torch.float32):
    """(score, columns [examples, k]) of a net on a split."""
    columns = task.columns(examples, items, predict(net, items, tokens, dtype))
    return float(task.score(*columns.T)), columns


# ---- learning rates, seeds and the wall clock -----------------------------------------------------------------

@dataclass
class Plan:
    """What a training does: `steps` a run, one run a learning rate with the first seed, then one a further seed."""
    steps: int
    rates: tuple
    seeds: int
    share: float = 1.0        # of each test split that is scored
    batch: int = BATCH


def pool(device, runs, jobs=None):
    """(executor, workers) in whose processes `runs` trainings share the cores; (None, 1) for one at a time, as on a GPU.

    Measured on 2 cores that other work shared, with batches of 32 English NER sentences: a step takes 2.0 times (12
    layers of 384) to 3.5 times (4 layers of 128) as much CPU time with two threads as with one, and no less wall time.
    So the second core does more for a second run. Longer batches gain less (QA, 4 layers of 128: 1.7 times). Up to twice as
    many runs as cores go on at once: three on two cores waste nothing, two and then one leave a core idle.
    """
    workers = 1 if device == "cuda" else min(jobs or (runs if runs < 2 * cores() else cores()), runs)
    if workers == 1:
        return None, 1
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (cores() // workers or 1,)), workers


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_worker(threads):
    """In a new process of the pool. It ends with the process that started it, however that ended."""
    torch.set_num_threads(threads)
    keep_freed_memory()                                  # a NER step of e5: 0.22 to 0.20 s
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def plan(wanted, seconds, step, look, test, workers=1):
    """Cut the wanted Plan to `seconds` -> Plan. workers: runs at the same time.

    step: {batch: seconds of one training step} of BATCH and SMALL; look: seconds of one look at the dev score; test: of
    scoring everything once. In this order: batches of SMALL; fewer steps, down to half; one learning rate, the highest
    whose product with the steps is within REACH; fewer steps, down to a sixth; fewer seeds; fewer steps still. Before all
    that, the test splits shrink until scoring them with all seeds takes at most TESTING of the time.

    Measured: e5-small on 2,700 English sentences for NER, 150 s of one core. 170 steps of 32 end at a dev F1 of 0.2 to
    0.3, 600 steps of 8 at 0.82: Adam moves a weight by at most the learning rate a step, whatever the batch. Too far is no
    better: its STS, three seeds: dev 0.85 to 0.88 after 704 steps of 8 at 2e-4, 0.89 after 657 at 1e-4.
    """
    if seconds == float("inf"):
        return wanted
    seconds = max(1.0, 0.85 * seconds)                   # other work on the machine
    share = min(1.0, TESTING * seconds / (wanted.seeds * test))
    options = [(wanted.rates, wanted.seeds, 1, BATCH), (wanted.rates, wanted.seeds, 2, SMALL)]
    options += [(wanted.rates[-1:], n, 6, SMALL) for n in range(wanted.seeds, 0, -1)]
    for rates, seeds, part, batch in options:
        waves = _waves(len(rates), seeds, workers)
        steps = int(((seconds - seeds * share * test) / waves - CHECKS * look) / step[batch])
        if steps >= wanted.steps / part:
            break
    steps = max(1, min(steps, wanted.steps))
    if len(rates) < len(wanted.rates):
        rates = (max((rate for rate in wanted.rates if rate * steps <= REACH), default=min(wanted.rates)),)
    return Plan(steps, rates, seeds, share, batch)


def _waves(rates, seeds, workers):
    """How often `workers` runs at a time go on. A choice of rates has to be made before further seeds begin."""
    return -(-seeds // workers) if rates == 1 else -(-rates // workers) + -(-(seeds - 1) // workers)


def timings(encoder, task, train, dev, tokens, dtype):
    """({batch: seconds a step}, seconds a look at dev, seconds a token of prediction), measured on a throw-away copy."""
    groups, device = by_example(train[1], len(train[0])), encoder.embedding.weight.device
    net = Net(copy.deepcopy(encoder), task.outputs).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)
    chosen, step = next(orders(len(groups), 1, seed=0)), {}
    for batch, count in ((BATCH, SMALL // 2), (SMALL, SMALL), (BATCH, BATCH // 2)):      # the first is to warm up
        began = time.monotonic()
        _train_step(net, task, [groups[i] for i in chosen[:count]], optimizer, tokens, dtype, device)
        step[batch] = batch / count * (time.monotonic() - began)
    sample = dev[1][:64]
    began = time.monotonic()
    predict(net, sample, tokens, dtype)
    each = (time.monotonic() - began) / sum(len(item.ids) for item in sample)
    return step, each * sum(len(item.ids) for item in dev[1]), each


def runs(encoder, task, train, dev, plan, tokens=8192, dtype=torch.float32, deadline=float("inf"), first_seed=0,
         pool=None, workers=1):
    """Yield the Run of each seed; the learning rate is the best of the sweep on dev.

    The sweep trains with the first seed only, and its best run is that seed's; one rate needs none. `workers` runs go
    on at the same time, in the processes of `pool`; each such wave gets an equal share of the time that is left, so that
    a slow machine shortens all alike.
    """
    waves = _waves(len(plan.rates), plan.seeds, workers)

    def trained(choices):
        """[(lr, seed)] -> their Runs, in order."""
        nonlocal waves
        for i in range(0, len(choices), workers):
            until = deadline if deadline == float("inf") else time.monotonic() + (deadline - time.monotonic()) / waves
            waves -= 1
            wave = [(encoder, task, train, dev, lr, seed, plan.steps, plan.batch, tokens, dtype, until)
                    for lr, seed in choices[i:i + workers]]
            if pool is None:
                yield from (fit(*arguments) for arguments in wave)
            else:
                yield from [future.result() for future in [pool.submit(fit, *arguments) for arguments in wave]]

    if len(plan.rates) == 1:
        found = trained([(plan.rates[0], seed) for seed in range(first_seed, first_seed + plan.seeds)])
        first = next(found)
        sweep = {first.lr: first.dev}
        yield first, sweep
        yield from ((run, sweep) for run in found)
        return
    sweep = list(trained([(lr, first_seed) for lr in plan.rates]))
    best = max(sweep, key=lambda run: run.dev)
    sweep = {run.lr: run.dev for run in sweep}
    yield best, sweep
    for run in trained([(best.lr, seed) for seed in range(first_seed + 1, first_seed + plan.seeds)]):
        yield run, sweep
