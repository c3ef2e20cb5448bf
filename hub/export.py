"""A model folder of ours -> a folder that transformers' Auto classes and sentence-transformers load, or ONNX.

    python unibert.py export runs/atlas/final hub/atlas                     # the format follows from the model
    AutoModelForMaskedLM.from_pretrained("hub/atlas"); AutoTokenizer.from_pretrained("hub/atlas")

The ids stay ours (<s> <pad> </s> <unk> <mask> are 0-4, as XLM-R's are but for <mask>), so weights are only renamed.
The tokenizer goes out as tokenizer.json, which repeats our cleaning and can fall back to bytes; XLM-R's own
sentencepiece.bpe.model cannot say that, and transformers' class for it has no byte fallback. WordPiece goes as
vocab.txt. `import` reads every such folder back to the same weights.
"""
from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import BOS, EOS, PAD, read_manifest
from files import write_atomically, write_safetensors
from hub.checkpoints import FAMILIES, ROBERTA, TITLE, TOKEN_TYPES, new_folder, read_json, save_vocabulary, their_names
from hub.vocabulary import SentencePieceModel, WordPiece, read_vocabulary, tokenizer_json
from unibert import Layout, UniBERT, load_model, refusals, rotary_table

FORMATS = ("bert", "xlm-roberta", "modernbert", "onnx")
CLASSES = {"bert": "Bert", "xlm-roberta": "XLMRoberta", "modernbert": "ModernBert"}


def choose_format(model: UniBERT, vocabulary: SentencePieceModel | WordPiece, wanted: str | None) -> str:
    """The format asked for, or the one that fits. ValueError when the blocks are of another kind."""
    fits = ("modernbert",) if model.config.block == "modern" else ("xlm-roberta", "bert")
    if wanted is None:
        return fits[-1] if isinstance(vocabulary, WordPiece) else fits[0]
    if wanted not in (*fits, "onnx"):
        raise ValueError(f"--format {wanted} cannot hold a {model.config.block!r} model, whose layers are "
                         f"{'ModernBERT' if fits[0] == 'modernbert' else 'BERT'}'s; use --format {' or '.join(fits)}")
    return wanted


def their_config(model: UniBERT, kind: str) -> dict:
    """config.json for transformers."""
    c = model.config
    config = dict(
        architectures=[CLASSES[kind] + ("ForMaskedLM" if c.mlm_head else "Model")], model_type=kind,
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.hidden_size // c.head_dim, intermediate_size=c.intermediate_size, max_position_embeddings=c.max_length,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, tie_word_embeddings=True, torch_dtype="float32")
    if kind == "modernbert":
        return config | dict(
            norm_eps=c.norm_eps, norm_bias=False, attention_bias=False, mlp_bias=False, classifier_bias=False,
            decoder_bias=True, hidden_activation="gelu", classifier_activation="gelu", classifier_pooling="mean",
            cls_token_id=BOS, sep_token_id=EOS, attention_dropout=0.0, embedding_dropout=c.dropout,
            mlp_dropout=c.dropout, global_attn_every_n_layers=c.global_every, global_rope_theta=c.rope_theta,
            local_rope_theta=c.local_rope_theta, local_attention=2 * (c.max_length - 1))
    config |= dict(hidden_act="gelu", layer_norm_eps=c.norm_eps, hidden_dropout_prob=c.dropout,
                   attention_probs_dropout_prob=0.0, type_vocab_size=2)
    if kind == "xlm-roberta":              # counts positions from pad_token_id + 1, and knows one type of token
        config |= dict(max_position_embeddings=c.max_length + PAD + 1, type_vocab_size=1)
    return config


def all_heads(name: str, tensor: Tensor, hidden: int) -> Tensor:
    """Heads that were pruned come back as zeros: transformers wants hidden_size / heads numbers in each, and with zero
    values and outputs they add nothing."""
    if name.endswith(("qkv.weight", "qkv.bias")):
        parts = tensor.unflatten(0, (3, -1))
        return torch.cat([parts, parts.new_zeros(3, hidden - parts.shape[1], *parts.shape[2:])], 1).flatten(0, 1)
    return F.pad(tensor, (0, hidden - tensor.shape[1])) if name.endswith("out.weight") else tensor


def their_tensors(model: UniBERT, kind: str) -> dict[str, Tensor]:
    """Our weights under the names, and in the parts, that transformers gives them."""
    family, tensors = FAMILIES[kind], {}
    prefix = family["prefix"] if model.config.mlm_head else ""
    for name, tensor in model.state_dict().items():
        tensor = all_heads(name, tensor, model.config.hidden_size)
        if name == "position_embedding.weight" and family is ROBERTA:
            tensor = F.pad(tensor, (0, 0, PAD + 1, 0))
        names = their_names(family, name)
        for their, part in zip(names, tensor.chunk(len(names))):
            tensors[their if their.startswith(tuple(family["head"].values())) else prefix + their] = part
    if model.config.block == "post":       # added to the positions, where they were not zero
        tensors[prefix + TOKEN_TYPES] = torch.zeros(1 if family is ROBERTA else 2, model.config.hidden_size)
    return tensors


def tokenizer_files(vocabulary: SentencePieceModel | WordPiece, max_length: int) -> dict[str, dict]:
    """JSON files for AutoTokenizer; the vocabulary itself is written by save_vocabulary."""
    if isinstance(vocabulary, WordPiece):
        return {"tokenizer_config.json": json.loads(vocabulary.files()["tokenizer_config.json"]) |
                {"model_max_length": max_length}}
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=max_length, padding_side="right",
        model_input_names=["input_ids", "attention_mask"], bos_token="<s>", cls_token="<s>", eos_token="</s>",
        sep_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
    return {"tokenizer.json": tokenizer_json(vocabulary), "tokenizer_config.json": settings}


def sentence_transformers_files(model: UniBERT) -> dict[str, object]:
    """The pipeline encoder -> mean over real tokens, as inference.embed computes it."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    return {
        "modules.json": [dict(idx=i, name=str(i), path=path, type=f"sentence_transformers.models.{kind}")
                         for i, (path, kind) in enumerate(modules)],
        "sentence_bert_config.json": dict(max_seq_length=model.config.max_length, do_lower_case=False),
        "1_Pooling/config.json": dict(word_embedding_dimension=model.config.hidden_size, pooling_mode_mean_tokens=True,
                                      pooling_mode_cls_token=False, pooling_mode_max_tokens=False,
                                      pooling_mode_mean_sqrt_len_tokens=False)}


# ------------------------------------------------------------------------------------------------- the model card

def run_facts(folder: Path) -> tuple[dict, dict, dict]:
    """What the run that left `folder` wrote beside it: (recipe, last validation, manifest of its data).

    Each is empty where it is not to be found; an imported model has none.
    """
    run = folder.resolve().parent
    recipe: dict = {}
    validation: dict = {}
    if (run / "metrics.jsonl").is_file() and (run / "config.json").is_file():
        recipe = read_json(run / "config.json")
        for line in (run / "metrics.jsonl").read_text().splitlines():
            validation = json.loads(line).get("validation", validation)
    manifest: dict = {}
    for place in (run, run.parent):                            # a teacher's run lies inside its student's
        if recipe and (place / "run.json").is_file():
            data = Path(read_json(place / "run.json").get("data") or place / "data")
            if (data / "manifest.json").is_file():
                manifest = read_manifest(data)
            break
    return recipe, validation, manifest


def model_card(model: UniBERT, kind: str, folder: Path) -> str:
    """README.md: data, languages, recipe and scores as the run recorded them, and how to use the folder."""
    recipe, validation, manifest = run_facts(folder)
    c, losses = model.config, validation.get("languages", {})
    trained = manifest.get("languages", {})
    codes = sorted(losses or trained)
    tasks = "fill-mask" if c.mlm_head else "sentence-similarity"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {tasks}",
             "tags: [sentence-transformers, feature-extraction]"]
    if names := [code for code in codes if re.fullmatch("[a-z]{2,3}", code)]:
        lines.append("language: [" + ", ".join(f'"{code}"' for code in names) + "]")   # quoted: YAML reads no as false
    parameters = sum(p.numel() for p in model.parameters())
    lines += ["---", "", TITLE, "",
              f"A multilingual encoder: {c.num_layers} layers, hidden size {c.hidden_size}, {c.num_heads} heads, "
              f"vocabulary {c.vocab_size:,}, at most {c.max_length} tokens, {parameters / 1e6:.1f} M parameters, "
              f"{'with' if c.mlm_head else 'without'} a masked-language-model head. Exported in the {kind} format.", ""]
    lines += ["## Data and languages", ""]
    if trained:
        total = sum(entry["train"]["tokens"] for entry in trained.values())
        lines += [f"{len(trained)} languages, {total:,} training tokens (SentencePiece), each language sampled in "
                  f"proportion to tokens^{recipe.get('alpha', 0.3)}.", ""]
    if codes:
        lines += ["| language | training tokens | validation MLM loss (nats) |", "|---|---|---|"]
        for code in codes:
            tokens = f"{trained[code]['train']['tokens']:,}" if code in trained else "not recorded"
            lines.append(f"| {code} | {tokens} | {f'{losses[code]:.3f}' if code in losses else 'not measured'} |")
    else:
        lines.append("Not recorded: the model was imported, or its run folder is gone.")
    lines += ["", "## Recipe", ""]
    if recipe:
        lines += ["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in recipe.items())]
    else:
        lines.append("Not recorded.")
    lines += ["", "## Scores", ""]
    scores = [(k, v) for k, v in validation.items() if isinstance(v, (int, float))]
    lines += [f"- {name}, on held-out documents: {value:.4f}" for name, value in scores] or [
        "Not measured: the run had no held-out text." if recipe else "Not recorded."]
    lines += ["", "## Use", "", "```python", "from sentence_transformers import SentenceTransformer",
              'vectors = SentenceTransformer("FOLDER").encode(["A sentence.", "Another one."])   # mean over tokens']
    if c.mlm_head:
        lines += ["from transformers import pipeline", 'pipeline("fill-mask", model="FOLDER")("Paris is the '
                  f'capital of {"[MASK]" if (folder / "vocab.txt").is_file() else "<mask>"}.")']
    return "\n".join([*lines, "```", ""])


# -------------------------------------------------------------------------------------------------------- export

def export_checkpoint(source: Path | str, target: Path | str, wanted: str | None = None) -> str:
    """Model folder `source` -> folder `target` in format `wanted` (None: the one that fits); returns the format.

    Raises ValueError when the model does not fit the format, or ONNX is asked for without its packages.
    """
    source, target = Path(source), Path(target)
    model, vocabulary = load_model(source), read_vocabulary(source)
    kind = choose_format(model, vocabulary, wanted)
    if len(vocabulary.pieces) != model.config.vocab_size:
        raise ValueError(f"{source}: its tokenizer has {len(vocabulary.pieces)} pieces, the model "
                         f"{model.config.vocab_size}")
    if kind == "onnx" and (missing := [p for p in ("onnx", "onnxscript") if importlib.util.find_spec(p) is None]):
        raise ValueError(f"--format onnx needs the package {' and '.join(missing)}, which torch's exporter uses; "
                         "install it, or choose another format")
    texts: dict[str, object] = tokenizer_files(vocabulary, model.config.max_length)
    if kind != "onnx":
        texts |= {"config.json": their_config(model, kind), **sentence_transformers_files(model)}
    with new_folder(target, source) as folder:
        save_vocabulary(vocabulary, folder)
        if kind == "onnx":
            write_onnx(model, folder / "model.onnx")
        else:
            write_safetensors(their_tensors(model, kind), folder / "model.safetensors")
        for name, content in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, [json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"])
        write_atomically(folder / "README.md", [model_card(model, kind, source).encode()])
    return kind


class PaddedLayout(Layout):
    """Attention over [B, L] padded sequences, flattened: what ONNX can express. `real` [B, L] bool marks tokens."""

    def __init__(self, real: Tensor, cos: Tensor | None, sin: Tensor | None):
        super().__init__(cu_seqlens=None, max_seqlen=None, cos=cos, sin=sin)
        self.real = real

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length = self.real.shape
        q, k, v = (x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.real[:, None, None, :])
        return out.transpose(1, 2).flatten(0, 1)


class PaddedEncoder(nn.Module):
    """(input_ids, attention_mask), both [B, L] int64 -> last_hidden_state [B, L, H], as transformers' models have it."""

    def __init__(self, model: UniBERT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        model, c = self.model, self.model.config
        batch, length = input_ids.shape
        position = torch.arange(length, device=input_ids.device).expand(batch, length).flatten()
        real = attention_mask.bool()
        x = model.embedding(input_ids.flatten())
        layouts = [PaddedLayout(real, None, None)] * 2
        if c.block == "post":
            x = x + model.position_embedding(position)
        else:
            layouts = [PaddedLayout(real, *rotary_table(position, c.head_dim, theta))
                       for theta in (c.rope_theta, c.local_rope_theta)]
        x = model.embedding_norm(x)
        for i, block in enumerate(model.blocks):
            x = block(x, layouts[bool(i % c.global_every)])
        return model.final_norm(x).view(batch, length, -1)


def write_onnx(model: UniBERT, path: Path) -> None:
    """model.onnx through torch's exporter, batch and length free. Needs the packages onnx and onnxscript."""
    ids = torch.full((2, 7), EOS)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_length)}
    with torch.no_grad():
        program = torch.onnx.export(PaddedEncoder(model).eval(), (ids, torch.ones_like(ids)), dynamo=True, verbose=False,
                                    input_names=["input_ids", "attention_mask"], output_names=["last_hidden_state"],
                                    dynamic_shapes=(free, free))
    program.save(path, external_data=False)


@click.command("export")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--format", "wanted", type=click.Choice(FORMATS), show_default="the one that fits the model",
              help="modern models: modernbert; post models: xlm-roberta or bert; onnx: either.")
def export_command(source, target, wanted):
    """Write the model folder SRC as a folder DST for transformers and sentence-transformers, with a model card."""
    with refusals():
        click.echo(f"{target}: written in the {export_checkpoint(source, target, wanted)} format")
