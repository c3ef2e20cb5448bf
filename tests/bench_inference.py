"""Sentences a second: packed inference against padded transformers of the same weights; not a test, run it by hand.

    python tests/bench_inference.py --text FILE                                  # a random model of e5-small's size
    python tests/bench_inference.py --text FILE --model DIR --batch 64

The model, a `post` one, is exported and read by transformers (fp32, SDPA). Both sides get token ids; tokenising is
the same for both and left out. Padded: batches of `--batch` sentences, padded to their longest, in the order of the
file and sorted by length. Rounds alternate; a figure is the median over rounds, and so is a ratio.
"""
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import BOS, EOS, PAD, encode_text  # noqa: E402
from hub.export import their_config, their_tensors  # noqa: E402
from inference import embed_ids, load  # noqa: E402
from files import write_safetensors  # noqa: E402
from unibert import UniBERT, UniBERTConfig  # noqa: E402


def padded(peer, sequences, batch_size, in_order):
    """Mean over real tokens, as sentence-transformers pools."""
    vectors = torch.empty(len(sequences), peer.config.hidden_size)
    order = range(len(sequences)) if in_order else sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for first in range(0, len(order), batch_size):
        batch = list(order[first:first + batch_size])
        longest = max(len(sequences[i]) for i in batch)
        ids = torch.tensor([sequences[i] + [PAD] * (longest - len(sequences[i])) for i in batch])
        real = (ids != PAD).long()
        hidden = peer(input_ids=ids, attention_mask=real).last_hidden_state
        vectors[batch] = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    return vectors


@click.command()
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path), help="One sentence a line.")
@click.option("--model", "folder", type=click.Path(path_type=Path), help="A model folder with `post` blocks.")
@click.option("--sentences", default=1000, show_default=True)
@click.option("--batch", default=32, show_default=True, help="Sentences in a padded batch.")
@click.option("--tokens", default=4096, show_default=True, help="Tokens in a packed batch.")
@click.option("--rounds", default=5, show_default=True)
def main(text, folder, sentences, batch, tokens, rounds):
    """Sentences a second on this CPU, packed and padded."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()][:sentences]
    if folder:
        model, tokenizer = load(folder)
        sequences = [[BOS, *encode_text(tokenizer, line)[:model.config.max_length - 2], EOS] for line in lines]
    else:                                   # a word and its punctuation are about 1.5 pieces; any ids do for timing
        torch.manual_seed(0)
        model = UniBERT(UniBERTConfig(vocab_size=8000, num_layers=12, num_heads=12, intermediate_size=1536,
                                      block="post", norm_eps=1e-12)).eval()
        sequences = [[BOS, *range(5, 5 + min(510, 3 * len(line.split()) // 2)), EOS] for line in lines]
    with tempfile.TemporaryDirectory() as hub, contextlib.redirect_stderr(io.StringIO()):
        write_safetensors(their_tensors(model, "xlm-roberta"), Path(hub) / "model.safetensors")
        config = transformers.XLMRobertaConfig(**{k: v for k, v in their_config(model, "xlm-roberta").items()
                                                  if k not in ("model_type", "architectures", "torch_dtype")})
        peer = transformers.XLMRobertaModel.from_pretrained(hub, config=config, dtype=torch.float32,
                                                            add_pooling_layer=False).eval()
    runs = {"packed": lambda: embed_ids(model, sequences, tokens),
            "padded, sorted by length": lambda: padded(peer, sequences, batch, False),
            "padded, in order": lambda: padded(peer, sequences, batch, True)}
    seconds = {name: [] for name in runs}
    with torch.inference_mode():
        vectors = {name: run() for name, run in runs.items()}           # warms up
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    lengths = [len(s) for s in sequences]
    click.echo(f"{len(lines)} sentences of {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.1f}; "
               f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, values in seconds.items():
        ratio = statistics.median(v / p for v, p in zip(values, seconds["packed"]))
        difference = (vectors[name] - vectors["packed"]).abs().max()
        click.echo(f"{name:26}{len(lines) / statistics.median(values):8.1f} sentences/s   {ratio:5.2f} x the time of packed"
                   f"   largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
