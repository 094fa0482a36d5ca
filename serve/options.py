"""Options of the commands that answer: the command line is made from these classes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

from qwen_ds.data.read.limits import FileOptions
from qwen_ds.decode.exceptions import InvalidSampling
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.errors import UserError
from qwen_ds.recipe.parser import parse_options
from qwen_ds.recipe.ranges import NonNegativeInt, PathText, PositiveFloat, PositiveInt, Seed
from serve.endpoint.options import EndpointOptions
from serve.structure import Structure, read_schema

_STRUCTURES: tuple[Literal["json_object", "json_schema", "regex", "choice"], ...] = (
    "json_object", "json_schema", "regex", "choice",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingOptions:
    """Options of how the next token is chosen."""

    do_sample: bool = False
    """false: always the most probable token, the same answers every time. true: draw, as the
    original API does."""
    temperature: PositiveFloat = SamplingParams.temperature
    """Divides the logits before drawing."""
    top_p: float = SamplingParams.top_p
    """Draw from the most probable tokens that together have this probability."""
    top_k: NonNegativeInt = SamplingParams.top_k
    """Draw from that many most probable tokens; 0 for no limit."""
    min_p: float = SamplingParams.min_p
    """Draw no token below this share of the most probable one's probability."""
    repetition_penalty: PositiveFloat = SamplingParams.repetition_penalty
    """Above 1: tokens of the prompt and of the answer so far become less probable."""
    presence_penalty: float = SamplingParams.presence_penalty
    """From -2 to 2: taken from the logits of tokens that the answer has."""
    frequency_penalty: float = SamplingParams.frequency_penalty
    """From -2 to 2: the same, for each time that the answer has the token."""
    logit_bias: dict[int, float] | None = None
    """Numbers from -100 to 100 to add to the logits of tokens, by id: {"1234": -100}."""
    max_new_tokens: PositiveInt = SamplingParams.max_new_tokens
    """Tokens of an answer at most; one that is cut there has the finish_reason length."""
    min_tokens: NonNegativeInt = SamplingParams.min_tokens
    """Tokens that an answer has at least."""
    ignore_eos: bool = SamplingParams.ignore_eos
    """Go on after the token that ends an answer, up to max_new_tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, and are no part of it."""
    json_object: bool = False
    """Hold each answer to a JSON object."""
    json_schema: str = ""
    """Hold each answer to JSON of this schema: a file that holds it, or its text."""
    regex: str = ""
    """Hold each answer to text that this expression matches as a whole, in the syntax of Rust's
    regex."""
    choice: list[str] = field(default_factory=list)
    """Hold each answer to one of these texts."""
    seed: Seed = SamplingParams.seed
    """With do_sample: each row's random numbers depend on this and on the row's place in the input
    alone."""

    def sampling(self) -> SamplingParams:
        """The numbers by which tokens are chosen. UserError for one out of its range."""
        names = {f.name for f in fields(SamplingParams)}
        given = {name: value for name, value in vars(self).items() if name in names}
        given["logit_bias"] = tuple((self.logit_bias or {}).items())
        try:
            return SamplingParams(**given)
        except InvalidSampling as error:
            raise UserError(str(error)) from None

    def structure(self) -> Structure | None:
        """The structure that answers are held to. UserError for two, or a schema that is none."""
        given = [name for name in _STRUCTURES if vars(self)[name]]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} are given; expected one of them")
        if not given:
            return None
        value = vars(self)[given[0]]
        return Structure(given[0], read_schema(value) if given[0] == "json_schema" else value)

    def check_tokens(self, num_tokens: int) -> None:
        """Raise UserError for a bias of a token that a vocabulary of this size lacks."""
        for token in self.logit_bias or {}:
            if token >= num_tokens:
                expected = f"token ids below {num_tokens}"
                raise UserError(f"--logit_bias has the token {token}; expected {expected}")

    def check_answers(self) -> None:
        """Raise UserError for options that cannot be meant, before anything is looked for."""
        self.sampling()
        self.structure()
        for name in ("stop", "choice"):
            if "" in vars(self)[name]:
                raise UserError(f"--{name} has an empty text; expected at least one character")


@dataclass(frozen=True)
class LoadOptions:
    """Options of a model that this process loads."""

    adapter: list[PathText] = field(default_factory=list)
    """Folder of a PEFT adapter to put on the model, unmerged; or of a run or checkpoint that holds
    one. NAME=DIR ...: several by name."""
    allow_pickle: bool = False
    """Also read adapter_model.bin and pytorch_model.bin, and of them nothing but tensors."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU when there is one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: as the checkpoint is stored (float16 becomes float32 on a CPU). Batches agree with
    single rows to the last token in float32 only."""


@dataclass(frozen=True)
class AnswerOptions(LoadOptions, SamplingOptions, EndpointOptions):
    """Options of prediction and of evaluation: how rows become prompts, and prompts answers."""

    adapter_column: str = "adapter"
    """With named adapters: the column that names the adapter of each row. A row without a value
    gets the bare base, or the adapter named default."""
    num_beams: PositiveInt = 1
    """More than 1: beam search by transformers' generate, slowly, a batch at a time."""
    logprobs: NonNegativeInt | None = None
    """Add log-probabilities of the answer's tokens to each line, with so many alternatives, up to
    20."""
    batch_size: PositiveInt = 32
    """Rows decoded together, where there is memory for them. It changes the speed, not the answers;
    in bfloat16 near ties may go the other way."""
    prefill_tokens: PositiveInt = 256
    """Tokens of prompts in one step at most; fewer on a CPU while other rows decode."""
    memory_gb: PositiveFloat | None = None
    """Memory for keys and values, in GB (10^9 bytes); unset: most of what is free once the model is
    loaded. Rows that find no room wait."""
    concurrency: PositiveInt = 32
    """With endpoint: requests that are under way at a time."""
    keep: list[str] = field(default_factory=list)
    """Columns of the input that each line of the output carries, as an object under `kept`."""
    references: list[str] = field(default_factory=list)
    """Columns with further answers to compare with, each a text or a list of texts. The answer's
    own column may be among them, where it holds a list."""
    long_prompts: Literal["stop", "cut"] = "stop"
    """A prompt that leaves no room for max_new_tokens in the model's context: stop before anything
    is generated, naming its file:line, or cut it (oldest turns first, then the end of the question)
    and count it."""
    limit: PositiveInt | None = None
    """Take only that many rows from the front."""
    overwrite: bool = False
    """Replace the output if it exists."""
    timeout_minutes: PositiveFloat = 30.0
    """With several ranks: give up when none of them finishes a row for so long. With endpoint: when
    the server answers nothing for so long."""
    format: str = "auto"
    """Name of a reader, or auto to recognise each row by its keys."""
    columns: dict[str, str] | None = None
    """Maps expected column names to those in the files, for example {"instruction": "q", "output":
    "a"}."""
    encoding: str = "auto"
    """Encoding of texts: gb18030, big5, cp1252 and so on. auto: UTF-8, or what each file's own
    bytes tell; where they leave a doubt, the command stops and asks for this option."""
    max_row_mb: PositiveInt = 64
    """Longest row of a file, in MB (10^6 bytes). An object that holds all rows counts as one."""
    max_expansion: PositiveInt = 200
    """How many times its own size a compressed file or an archive may unfold to; every one may
    unfold to 256 MB."""
    system: str | None = None
    """System text of rows that bring none; unset means the original's "You are a helpful
    assistant."."""
    special_tokens_in_text: Literal["escape", "parse"] = "escape"
    """Whether <|im_end|> and the like, spelled in a text, stay plain text or become control
    tokens."""

    def __post_init__(self) -> None:
        self.check_answers()
        self.files()

    def files(self) -> FileOptions:
        """How input files are read. UserError for an unknown encoding."""
        return FileOptions(self.encoding, self.max_row_mb, self.max_expansion)


@dataclass(frozen=True, kw_only=True)
class PredictOptions(AnswerOptions):
    """Options of serve.predict."""

    model: PathText | None = None
    """Folder or hub id of a Qwen checkpoint. Not needed with endpoint."""
    input: list[PathText]
    """Files, folders or hub data sets with questions, in any format that training reads; answers
    become references."""
    output: PathText
    """File to write: one JSON object a row, in the order of the input. -: standard output, which
    then gets nothing else."""


@dataclass(frozen=True)
class GeneralOptions:
    """Options of the check that a model has not forgotten what it could."""

    general: list[PathText] = field(default_factory=list)
    """Files or folders of texts ({"text": ..}) and of questions (question, A, B, C, D, answer, as
    in C-Eval), by whose likelihood each model is measured; with compare, the first against the
    others."""
    general_examples: list[PathText] = field(default_factory=list)
    """With general: questions of which up to five, of the same subject if there are any, stand with
    their answers before each question (C-Eval's dev)."""


@dataclass(frozen=True)
class JudgeOptions:
    """Options of a model elsewhere that compares the answers of two others."""

    judge: str | None = None
    """With two or more models: URL of a server with OpenAI's HTTP API whose model says which answer
    is better, the first model's or another's. Each pair is asked about twice, in both orders."""
    judge_model: str | None = None
    """With judge: the server's name of the model; unset: the first that it lists."""
    judge_key_file: str | None = None
    """With judge: file that holds the server's key and nothing else."""
    judge_language: Literal["auto", "zh", "en"] = "auto"
    """Language of the questions to the judge; auto: Chinese for rows with Chinese in the prompt."""
    judge_max_tokens: PositiveInt = 1024
    """Tokens of a judge's reply at most, its reasoning included."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AnswerOptions, GeneralOptions, JudgeOptions):
    """Options of serve.evaluate."""

    model: PathText | None = None
    """Folder or hub id of a Qwen checkpoint. Not needed with endpoint or predictions, nor with
    compare where no adapter is compared."""
    compare: list[PathText] = field(default_factory=list)
    """Models to score on the same rows, the others against the first: PLACE or NAME=PLACE. A place
    is a model's folder or hub id; or the folder of an adapter, run or checkpoint, to put on
    `model`; with endpoint the server's name of a model."""
    data: list[PathText] = field(default_factory=list)
    """Files, folders or hub data sets with questions and reference answers."""
    output_dir: PathText
    """Folder to write to: predictions.jsonl, rows.jsonl, metrics.json and speed.json; of each model
    in a folder of its name where several are compared, and comparison.json."""
    predictions: list[PathText] = field(default_factory=list)
    """Score these files of serve.predict instead of generating: FILE or NAME=FILE. Several are
    compared, the others with the first."""
    training: list[PathText] = field(default_factory=list)
    """Files that the model was trained on: the share of answers that stand in them is measured."""
    require: list[str] = field(default_factory=list)
    """Figures that must hold, or the exit code is 1: "seed.rouge-l>=0.2" "general.forgot<1", with
    >=, >, <= or <. Of several models all but the first must hold them, or the one that is named:
    "NAME:stop_rate>=0.99"."""
    perplexity: bool = True
    """Also measure how probable the model finds the first reference of each row."""
    resamples: PositiveInt = 1000
    """Resamples of the rows, by a fixed seed, from which intervals and significance come."""


Options = TypeVar("Options", bound=SamplingOptions)
# Training calls these data.format and so on; here --data.format is the same as --format.
_SHARED = "format|columns|system|encoding|max_row_mb|max_expansion|special_tokens_in_text"
_TEXTS = ("--regex", "--json_schema")
_DATA_OPTION = re.compile(rf"\A--data\.(?=({_SHARED})(=|\Z))")


def parse(kind: type[Options], description: str, argv: Sequence[str] | None = None) -> Options:
    """Options of a command from argv (None: the process's own) and the YAML file named by --config.

    Raises:
        UserError: an unknown option, a value of the wrong type or out of range, a missing option.
    """
    words = sys.argv[1:] if argv is None else argv
    words = [_DATA_OPTION.sub("--", word) for word in words]
    return parse_options(kind, description, list(_texts_kept(words)))


def _texts_kept(words: Sequence[str]) -> Iterator[str]:
    """The words as they are meant. A single text such as [END] would be taken for the list of END;
    an empty text, such as a shell's variable that is not set, for an option that is not given."""
    for before, word, after in zip(["", *words], words, [*words[1:], "--"], strict=False):
        is_single = before in ("--stop", "--choice") and after.startswith("--")
        is_text = is_single and word.startswith("[") and not _is_list(word)
        if (before in _TEXTS and not word) or word in [f"{name}=" for name in _TEXTS]:
            raise UserError(f"{word.removesuffix('=') or before} is empty; expected a text")
        yield json.dumps([word]) if is_text else word


def _is_list(word: str) -> bool:
    """Whether a word is a JSON list of texts."""
    try:
        found = json.loads(word)
    except ValueError:
        return False
    return bool(found) and all(isinstance(text, str) for text in found)
