"""Model folders in and out: BERT, XLM-R/RoBERTa, DistilBERT and ModernBERT as the model hubs lay them out.

    python unibert.py import SRC DST --check                        # a downloaded folder -> a model folder of ours
    python unibert.py export SRC DST --format modernbert            # ours -> what transformers' Auto classes load
    python unibert.py trim SRC DST --data DIR --vocab-size 64000    # only the pieces that DIR needs

In reading order: names of the tensors, import, check against transformers, trim, layers of a teacher for a student,
commands; hub/export.py has the way out. Nothing in a folder is run: pickles are read as tensors only, headers are checked
before use.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from data import (BOS, EOS, FIRST_PIECE, Corpus, encode_text, list_sources, load_tokenizer, pack_sequences,
                  read_documents)
from files import read_safetensors, write_atomically
from hub.vocabulary import (SentencePieceModel, WordPiece, choose_pieces, from_fairseq, is_ours, keep_pieces,
                            load_vocabulary, read_tokenizer_json, read_vocabulary, read_wordpiece)
from unibert import UniBERT, UniBERTConfig, empty_model, load_model, mean_pool, refusals, save_model

# ------------------------------------------------------------------------------------------- names of the tensors

# Our module -> theirs. Three names: ours is the three one below the other. `layer` stands in front of a layer's.
BERT = dict(
    prefix="bert.", layer="encoder.layer.",
    body={"embedding": "embeddings.word_embeddings", "position_embedding": "embeddings.position_embeddings",
          "embedding_norm": "embeddings.LayerNorm"},
    block={"qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
           "out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
           "up": "intermediate.dense", "down": "output.dense", "mlp_norm": "output.LayerNorm"},
    head={"head_dense": "cls.predictions.transform.dense", "head_norm": "cls.predictions.transform.LayerNorm",
          "decoder_bias": "cls.predictions.bias"},
    decoder="cls.predictions.decoder")
ROBERTA = dict(BERT, prefix="roberta.", decoder="lm_head.decoder",
               head={"head_dense": "lm_head.dense", "head_norm": "lm_head.layer_norm", "decoder_bias": "lm_head.bias"})
DISTILBERT = dict(
    BERT, prefix="distilbert.", layer="transformer.layer.", decoder="vocab_projector",
    block={"qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "out": "attention.out_lin",
           "attention_norm": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2", "mlp_norm": "output_layer_norm"},
    head={"head_dense": "vocab_transform", "head_norm": "vocab_layer_norm", "decoder_bias": "vocab_projector.bias"})
MODERNBERT = dict(
    prefix="model.", layer="layers.", decoder="decoder",
    body={"embedding": "embeddings.tok_embeddings", "embedding_norm": "embeddings.norm", "final_norm": "final_norm"},
    block={"qkv": "attn.Wqkv", "out": "attn.Wo", "attention_norm": "attn_norm", "up": "mlp.Wi", "down": "mlp.Wo",
           "mlp_norm": "mlp_norm"},
    head={"head_dense": "head.dense", "head_norm": "head.norm", "decoder_bias": "decoder.bias"})
FAMILIES = {"bert": BERT, "roberta": ROBERTA, "xlm-roberta": ROBERTA, "distilbert": DISTILBERT,
            "modernbert": MODERNBERT}
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
# Parts that some checkpoints carry and an encoder with an MLM head does not use.
UNUSED_PARTS = re.compile(r"pooler\.dense\.|cls\.seq_relationship\.|embeddings\.position_ids$")


def their_names(family: dict, ours: str) -> list[str]:
    """A tensor's name in our state_dict -> its name or three names in theirs, without the family's prefix."""
    module, _, parameter = ours.rpartition(".")
    if ours in family["head"]:                                        # decoder_bias
        return [family["head"][ours]]
    if module in family["head"]:
        return [f"{family['head'][module]}.{parameter}"]
    if module in family["body"]:
        return [f"{family['body'][module]}.{parameter}"]
    _, layer, module = module.split(".")
    names = family["block"][module]
    return [f"{family['layer']}{layer}.{name}.{parameter}" for name in ([names] if isinstance(names, str) else names)]


# ---------------------------------------------------------------------------------------------------------- import

def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pytorch_model.bin; a pickle that would do anything but hold tensors is refused unread."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{path}: refused, it is no plain file of tensors" +
                         (f" (it asks for {wanted[1]}, which could run code)" if wanted else "") +
                         "; get the checkpoint as safetensors") from None
    except Exception as error:  # on a damaged file torch fails in any of a dozen ways
        raise ValueError(f"{path}: cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: is no dictionary of tensors")
    return tensors


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is no JSON object")
    return value


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, from one file or from shards with an index. ValueError names the fault."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map")
        tensors = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ValueError(f"{index}: names the file {shard}, which is not in {folder}")
            part = read(folder / shard)
            wanted = {key for key, file in weight_map.items() if file == shard}
            for key in sorted(wanted ^ part.keys()):
                raise ValueError(f"{folder / shard}: tensor {key} is " + ("missing" if key in wanted else
                                                                          "not listed in the index"))
            tensors |= part
        return tensors
    raise ValueError(f"{folder}: has neither model.safetensors nor pytorch_model.bin (nor shards with an index)")


def read_config(folder: Path) -> tuple[str, UniBERTConfig, int, int]:
    """config.json -> (family, our config with the checkpoint's vocabulary, its position rows, unused ones in front).

    ValueError, in one line, for a kind of model that our blocks would not compute exactly.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no config.json, so it is no checkpoint folder")
    config = read_json(path)
    kind = config.get("model_type")

    def need(name: str, wanted, default):
        if config.get(name, default) != wanted:
            raise ValueError(f"{path}: {name} is {config.get(name, default)!r}; only {wanted!r} is supported")

    if str(kind) not in FAMILIES:
        ours = "; this is a model folder of ours already" if "block" in config else ""
        raise ValueError(f"{path}: model_type is {kind!r}; known are {', '.join(FAMILIES)}{ours}")
    try:
        if kind == "modernbert":
            ours, rows, unused = _modern_config(config, path, need), 0, 0
        else:
            distil = kind == "distilbert"
            need("activation" if distil else "hidden_act", "gelu", "gelu")
            need("position_embedding_type", "absolute", "absolute")
            need("is_decoder", False, False)
            unused = int(config.get("pad_token_id", 1)) + 1 if FAMILIES[kind] is ROBERTA else 0
            rows = int(config["max_position_embeddings"])
            sizes = (("dim", "n_layers", "n_heads", "hidden_dim") if distil else
                     ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
            ours = UniBERTConfig(int(config["vocab_size"]), *(int(config[name]) for name in sizes), rows - unused,
                                 block="post", norm_eps=float(config.get("layer_norm_eps", 1e-12)))
    except KeyError as error:
        raise ValueError(f"{path}: has no {error.args[0]}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if not 16 <= ours.head_dim <= 128:
        raise ValueError(f"{path}: heads of {ours.head_dim} numbers; kernels.attention takes 16 to 128")
    return kind, ours, rows, unused


def _modern_config(config: dict, path: Path, need) -> UniBERTConfig:
    need("hidden_activation", "gelu", "gelu")
    need("classifier_activation", "gelu", "gelu")
    layers = int(config["num_hidden_layers"])
    every = int(config.get("global_attn_every_n_layers", 3))
    types = config.get("layer_types")
    if types is not None:
        every = next((i for i, kind in enumerate(types) if i and kind == "full_attention"), max(layers, 2))
    if every < 1:
        raise ValueError(f"{path}: global_attn_every_n_layers is {every}; it must be at least 1")
    mixed = layers > 1 and every > 1
    kinds = ("full_attention", "sliding_attention")
    if types is not None and (len(types) != layers or any(kind != kinds[i % every > 0] for i, kind in enumerate(types))):
        raise ValueError(f"{path}: layer_types does not turn to full attention at every n-th layer; not supported")
    thetas = config.get("rope_parameters") or {}
    local, wide = (thetas.get(key, {}) for key in ("sliding_attention", "full_attention"))
    if any(part.get("rope_type", "default") != "default" for part in (local, wide)):
        raise ValueError(f"{path}: scaled rotary positions are not supported")
    length = int(config["max_position_embeddings"])
    if mixed:                                                 # up to here no local layer's window cuts anything off
        length = min(length, int(config.get("local_attention", 128)) // 2 + 1)
    return UniBERTConfig(
        int(config["vocab_size"]), int(config["hidden_size"]), layers, int(config["num_attention_heads"]),
        int(config["intermediate_size"]), length, block="modern", norm_eps=float(config.get("norm_eps", 1e-5)),
        rope_theta=float(wide.get("rope_theta", config.get("global_rope_theta", 160_000.0))),
        global_every=every if mixed else 1,
        local_rope_theta=float(local.get("rope_theta", config.get("local_rope_theta", 10_000.0))))


def read_tokenizer(folder: Path):
    """The vocabulary of a checkpoint -> (SentencePieceModel or WordPiece in our order, rows), or None.

    rows[i] is the checkpoint's id of our piece i. ValueError when there is one that cannot be used.
    """
    for name in ("sentencepiece.bpe.model", "tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            model = SentencePieceModel.read(folder / name)
            if is_ours(model):                               # a folder that `export` wrote
                return model, list(range(len(model.pieces)))
            return from_fairseq(model, folder / name)
    if (folder / "vocab.txt").is_file() and not (folder / "merges.txt").is_file():
        return read_wordpiece(folder)
    return read_tokenizer_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None


def convert_weights(tensors: dict[str, Tensor], kind: str, config: UniBERTConfig, position_rows: int,
                    unused_positions: int, rows: list[int] | None, where: Path) -> UniBERT:
    """Tensors of a checkpoint -> our model in fp32, its vocabulary in the order `rows` (None: as it is).

    Raises ValueError, naming the tensor, for one that is missing, surplus or of another shape, and for a decoder
    that is not tied to the embedding.
    """
    family = FAMILIES[kind]
    tensors = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)):
               tensor for name, tensor in tensors.items()}
    tensors = {name.removeprefix(family["prefix"]): tensor for name, tensor in tensors.items()
               if not UNUSED_PARTS.search(name)}
    embedding_name = their_names(family, "embedding.weight")[0]
    for name, tied in ((family["decoder"] + ".weight", embedding_name),
                       (family["decoder"] + ".bias", family["head"]["decoder_bias"])):
        if name in tensors and name != tied:
            copy = tensors.pop(name)
            if tied in tensors and not torch.equal(copy, tensors[tied]):
                raise ValueError(f"{where}: {name} differs from {tied}; a decoder that is not tied is not supported")
            tensors.setdefault(tied, copy)
    config = dataclasses.replace(config, mlm_head=any(name.startswith(tuple(family["head"].values()))
                                                      for name in tensors))
    model = empty_model(config, len(tensors))
    token_types = tensors.pop(TOKEN_TYPES, None)
    wanted, state = {}, {}
    for name, slot in model.state_dict().items():
        names = their_names(family, name)
        shape = list(slot.shape)
        if name == "position_embedding.weight":
            shape[0] = position_rows
        wanted |= {their: [shape[0] // len(names), *shape[1:]] for their in names}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{where}: tensor {name} is " + ("missing" if name in wanted else
                                                          f"surplus; no {kind} encoder with MLM head has it"))
    for name, shape in wanted.items():
        if list(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            raise ValueError(f"{where}: {name} is {tensors[name].dtype} {list(tensors[name].shape)}; config.json asks "
                             f"for floats {shape}")
    for name in model.state_dict():
        state[name] = torch.cat([tensors.pop(their).float() for their in their_names(family, name)])
    if "position_embedding.weight" in state:
        state["position_embedding.weight"] = state["position_embedding.weight"][unused_positions:].clone()
        if token_types is not None:                          # every token is of type 0: one constant, added here
            if token_types.ndim != 2 or token_types.shape[1] != config.hidden_size:
                raise ValueError(f"{where}: {TOKEN_TYPES} has shape {list(token_types.shape)}")
            state["position_embedding.weight"] += token_types[0].float()
    if rows is not None:
        if max(rows) >= config.vocab_size:
            raise ValueError(f"{where}: the vocabulary has ids up to {max(rows)}, the embedding {config.vocab_size} rows")
        for name in ("embedding.weight", "decoder_bias"):
            if name in state:
                state[name] = state[name][rows]
    model = empty_model(dataclasses.replace(config, vocab_size=state["embedding.weight"].shape[0]))
    model.load_state_dict(state, assign=True)
    return model.eval()


def import_checkpoint(source: Path | str):
    """A hub-layout folder -> (UniBERT, its vocabulary or None, rows or None, lines to tell). Raises ValueError."""
    source = Path(source)
    kind, config, position_rows, unused = read_config(source)
    found = read_tokenizer(source)
    vocabulary, rows = found or (None, None)
    model = convert_weights(read_weights(source), kind, config, position_rows, unused, rows, source)
    told = []
    if found is None:
        told.append("no SentencePiece or WordPiece vocabulary: the ids stay the checkpoint's, and fill-mask and embed "
                    "cannot read text with this model")
    elif config.vocab_size > len(rows):
        told.append(f"{config.vocab_size - len(rows)} embedding rows that no piece points to are left out")
    if not model.config.mlm_head:
        told.append("an encoder without MLM head: a teacher for hidden states, relations and sentence vectors")
    if model.config.global_every > 1:
        told.append(f"its local attention is not built in: max_length is {model.config.max_length}, up to where the "
                    "window cuts nothing off and the outputs are exact")
    return model, vocabulary, rows, told


def save_vocabulary(vocabulary: SentencePieceModel | WordPiece, folder: Path) -> None:
    for name, data in vocabulary.files().items():
        write_atomically(folder / name, [data])


TITLE = "# A UniBERT model"            # of the model card that export writes


def written_by_us(folder: Path) -> bool:
    """Whether a folder is an empty one, a model folder of ours or an export: nothing else is ever replaced."""
    config, card = folder / "config.json", folder / "README.md"
    if folder.name == "final" and (folder.parent / "metrics.jsonl").is_file():        # what a run has learnt
        return False
    return (folder.is_dir() and not any(folder.iterdir())
            or config.is_file() and {"block", "vocab_size"} <= read_json(config).keys()
            or card.is_file() and TITLE in card.read_text(encoding="utf-8", errors="replace").splitlines())


@contextlib.contextmanager
def new_folder(folder: Path, source: Path):
    """Yields a folder beside `folder` to fill; it takes its place when the block ends well, else it goes.

    ValueError when `folder` is there and is not one that we wrote, or holds `source`.
    """
    if source.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: is or holds the source; choose another name")
    if folder.exists() and not written_by_us(folder):
        raise ValueError(f"{folder}: exists and was not written by import, trim or export; choose another name")
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            if any(folder.iterdir()):
                click.echo(f"note: {folder} was there, and is replaced")
            folder.rename(old)             # so that at no moment half a folder goes by this name
        partial.rename(folder)
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------- check against transformers

SENTENCES = """The quick brown fox jumps over the lazy dog, twice in 2024.
Le garçon a mangé une crème brûlée à l'hôtel.
Быстрая лиса перепрыгнула через ленивую собаку.
Η γρήγορη αλεπού πηδάει πάνω από το σκυλί.
कल सुबह हम बाज़ार जाएँगे।
ذهب الولد إلى المدرسة صباحا.
昨天下午我们去了图书馆。
東京は日本の首都です。
오늘은 날씨가 매우 좋습니다.
ילדים משחקים בגן.
Thủ đô của Việt Nam là Hà Nội.
Mtoto anasoma kitabu chake shuleni.
ราคา: 1.250,50 € (−5 %)
x""".split("\n")


@torch.no_grad()
def compare(model: UniBERT, source: Path | str, tokenizer=None, rows: list[int] | None = None) -> dict[str, float]:
    """Our model against transformers' reading of `source`: largest absolute differences, and equal token ids.

    Sentences in a dozen scripts where `tokenizer` is given, else random ids; theirs padded, ours packed. Returns
    hidden, and pooled (unit length), logits (all tokens; with an MLM head), sentences and same_ids (where it can read
    the tokenizer). Raises ImportError without transformers.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    limit = model.config.max_length
    to_theirs = np.arange(model.config.vocab_size) if rows is None else np.array(rows)
    result: dict[str, float] = {}
    rng = np.random.default_rng(0)
    ours = [rng.integers(FIRST_PIECE, model.config.vocab_size, n).tolist() for n in (1, 7, min(64, limit))]
    if tokenizer is not None:
        ours += [[BOS, *encode_text(tokenizer, text)[:limit - 2], EOS] for text in SENTENCES]
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(source)
        except (ImportError, ValueError):      # it reads SentencePiece files by protobuf; without it, it asks for tiktoken
            theirs = None
        if theirs is not None:
            same = [list(theirs(text, truncation=True, max_length=limit)["input_ids"]) == to_theirs[ids].tolist()
                    for text, ids in zip(SENTENCES, ours[-len(SENTENCES):])]
            result |= dict(sentences=len(same), same_ids=sum(same))
    kind = transformers.AutoModelForMaskedLM if model.config.mlm_head else transformers.AutoModel
    peer = kind.from_pretrained(source, dtype=torch.float32).eval()
    longest = max(map(len, ours))
    pad = getattr(peer.config, "pad_token_id", 0) or 0
    padded = torch.full((len(ours), longest), pad)
    real = torch.zeros(len(ours), longest, dtype=torch.long)
    for i, ids in enumerate(ours):
        padded[i, :len(ids)] = torch.from_numpy(to_theirs[ids])
        real[i, :len(ids)] = 1
    body = peer.base_model if model.config.mlm_head else peer
    their_hidden = body(input_ids=padded, attention_mask=real).last_hidden_state[real.bool()]
    tokens, cu_seqlens, longest = pack_sequences(ours)
    hidden = model.encode(tokens, cu_seqlens, longest)
    result["hidden"] = (hidden - their_hidden).abs().max().item()
    pooled, their_pooled = (torch.nn.functional.normalize(mean_pool(x, cu_seqlens)) for x in (hidden, their_hidden))
    result["pooled"] = (pooled - their_pooled).abs().max().item()
    if model.config.mlm_head:
        theirs = peer(input_ids=padded, attention_mask=real).logits[real.bool()][:, to_theirs]
        result["logits"] = (model.mlm_logits(hidden) - theirs).abs().max().item()
    return result


# ----------------------------------------------------------------------------------------------- trim the vocabulary

def texts_by_language(folder: Path | str) -> list:
    """[(language, iterator of texts)] of a folder of <code>.txt files, or of the training split of one that `data.py
    prepare` wrote. That one holds ids; they are decoded with its own tokenizer."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        return [(language, (text for text, _ in read_documents(path))) for language, path in list_sources(folder)]
    corpus = Corpus(folder)
    tokenizer = load_tokenizer(corpus.tokenizer_path)

    def texts(language):
        tokens = corpus.tokens(language)
        offsets = np.fromfile(folder / f"{language}.train.offsets", "<i8")
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
            yield tokenizer.decode(tokens[start:stop].tolist())
    return [(language, texts(language)) for language in corpus.languages]


def corpus_texts(folder: Path | str):
    """All texts of such a folder, one language after another -> iterator."""
    for _, texts in texts_by_language(folder):
        yield from texts


def count_pieces(tokenizer, texts, size: int) -> np.ndarray:
    """How often each of `size` pieces stands in `texts`, an iterator -> [size] int64."""
    counts = np.zeros(size, np.int64)
    for text in texts:
        np.add.at(counts, np.array(encode_text(tokenizer, text), np.int64), 1)
    return counts


def trim_model(model: UniBERT, keep: np.ndarray) -> UniBERT:
    """The model with the rows `keep` of its embedding and decoder bias."""
    state = dict(model.state_dict())
    for name in ("embedding.weight", "decoder_bias"):
        if name in state:
            state[name] = state[name][torch.from_numpy(keep)]
    small = empty_model(dataclasses.replace(model.config, vocab_size=len(keep)))
    small.load_state_dict(state, assign=True)
    return small.eval()


# --------------------------------------------------------------------------------------------- students from layers

def student_from_layers(teacher: UniBERT, layers: list[int], dropout: float = 0.0) -> UniBERT:
    """A student with the teacher's embeddings, head and layers `layers` (from 0, ascending), as copies, and its own dropout.

    For a teacher without MLM head the student gets a fresh one. ValueError for layers that the teacher lacks.
    """
    config = teacher.config
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= config.num_layers:
        raise ValueError(f"layers {','.join(map(str, layers))}: must be ascending numbers from 0 to "
                         f"{config.num_layers - 1}, the teacher's layers")
    if config.global_every > 1 and len(layers) < config.num_layers:
        raise ValueError("the teacher mixes local and global layers; a student from some of them is not supported")
    student = UniBERT(dataclasses.replace(config, num_layers=len(layers), mlm_head=True, dropout=dropout))
    numbers = {old: new for new, old in enumerate(layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        part, _, rest = name.partition(".")
        if part != "blocks":
            state[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        if int(number) in numbers:
            state[f"blocks.{numbers[int(number)]}.{rest}"] = tensor
    # A modern model's first layer has no norm of its own: the scale of the one it loses moves into the projection.
    if (scale := state.pop("blocks.0.attention_norm.weight", None)) is not None and config.block == "modern":
        state["blocks.0.qkv.weight"] = state["blocks.0.qkv.weight"] * scale
    elif scale is not None:
        state["blocks.0.attention_norm.weight"] = scale
    student.load_state_dict({**student.state_dict(), **state})
    return student


# -------------------------------------------------------------------------------------------------------- commands

@click.command("import")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Compare a forward pass with transformers, where that is installed.")
def import_command(source, target, check):
    """Read a BERT, XLM-R/RoBERTa, DistilBERT or ModernBERT folder SRC, write a model folder DST."""
    with refusals():
        model, vocabulary, rows, told = import_checkpoint(source)
        with new_folder(target, source) as folder:
            save_model(model, folder)
            if vocabulary is not None:
                save_vocabulary(vocabulary, folder)
        tokenizer = None if vocabulary is None else load_vocabulary(target)
        parameters = sum(p.numel() for p in model.parameters())
        click.echo(f"{target}: {model.config.num_layers} layers, hidden {model.config.hidden_size}, vocabulary "
                   f"{model.config.vocab_size:,}, {parameters / 1e6:.1f} M parameters")
        for line in told:
            click.echo(f"note: {line}")
        if check:
            check_import(load_model(target), source, tokenizer, rows)


def check_import(model, source, tokenizer, rows):
    try:
        found = compare(model, source, tokenizer, rows)
    except ImportError as error:
        click.echo(f"check: skipped, needs transformers ({error})")
        return
    if tokenizer is not None and "same_ids" not in found:
        click.echo("check: token ids not compared: transformers cannot read the tokenizer; SentencePiece files it reads with protobuf")
    elif tokenizer is not None:
        click.echo(f"check: token ids equal transformers' in {found['same_ids']} of {found['sentences']} sentences")
    worst = {key: found[key] for key in ("hidden", "pooled", "logits") if key in found}
    click.echo("check: largest difference from transformers: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    if 2 * found.get("same_ids", 0) < found.get("sentences", 0):
        raise ValueError(f"{source}: its text is cut into other tokens than transformers cuts it into; do not use this import")
    if not max(worst.values()) < 1e-3 or not found["pooled"] < 1e-4:
        raise ValueError(f"{source}: the outputs differ from transformers'; do not use this import")


@click.command("trim")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path),
              help="The corpus: a folder that data.py prepared, or one of <code>.txt files.")
@click.option("--vocab-size", default=64000, show_default=True, type=click.IntRange(1), help="Pieces to keep.")
@click.option("--prior", is_flag=True, help="The corpus is a small sample of its languages: what the tokenizer itself expects of a "
              "piece counts as much as how often it was seen.")
def trim_command(source, target, data, vocab_size, prior):
    """Keep the pieces that a corpus needs: model folder SRC -> smaller model folder DST."""
    with refusals():
        model, tokenizer, vocabulary = load_model(source), load_vocabulary(source), read_vocabulary(source)
        counts = count_pieces(tokenizer, corpus_texts(data), model.config.vocab_size)
        if not counts.sum():
            raise ValueError(f"{data}: holds no text")
        keep = choose_pieces(vocabulary, counts, vocab_size, prior)
        small = trim_model(model, keep)
        with new_folder(target, source) as folder:
            save_model(small, folder)
            save_vocabulary(keep_pieces(vocabulary, keep), folder)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    changed = counts.sum() - counts[keep].sum()
    click.echo(f"{target}: {vocab_size:,} of {model.config.vocab_size:,} pieces; {changed:,} of the corpus's "
               f"{counts.sum():,} tokens ({changed / counts.sum():.3%}) are of dropped pieces and will be cut anew")
    click.echo(f"{after / 1e6:.1f} M parameters instead of {before / 1e6:.1f} M ({1 - after / before:.0%} less)")
