"""A model folder and its library: all that a runtime needs to know before weights are loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaxlm.errors import ConfigError, RequestError, TemplateError
from relaxlm.runtime.chat_config import ChatConfigFile, EmbeddingMetadata
from relaxlm.runtime.chat_settings import ChatConfig
from relaxlm.runtime.generation import GenerationConfig
from relaxlm.runtime.library import (
    Library,
    check_device,
    check_fits_model,
    check_settings,
    refuse_compile_options,
)
from relaxlm.runtime.params import WeightFolder
from relaxlm.runtime.prompt import PromptBuilder
from relaxlm.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """
    Attributes:
        config: mlc-chat-config.json. chat_config: what the caller has changed of it.
        continues_text: a prompt ends with the user's own text, as that of a base model does, so
            that a reply may begin with a space.
    """

    folder: Path
    config: ChatConfigFile
    chat_config: ChatConfig
    tokenizer: Tokenizer
    prompts: PromptBuilder
    weights: WeightFolder
    library: Library
    continues_text: bool

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        chat_config: ChatConfig | Mapping[str, Any] | None = None,
        model_lib: str | Path | None = None,
        progress: Callable[[str, float], None] = lambda stage, share: None,
        opt: str | None = None,
    ) -> "ServedModel":
        """Read a folder and load its library, or compile it now.

        Args:
            folder: made by `convert_weight` and `gen_config` (or published in this form).
            device: "auto", "cpu", "cuda" or "metal".
            chat_config: replaces settings of the folder.
            model_lib: the compiled library; compiled now and cached if None.
            progress: called with a stage's name and the share of the work done before it, if the
                library is compiled now.
            opt: as `relaxlm compile --opt` takes it; only without `model_lib`.

        Raises:
            RelaxLMError: a folder, library or setting that is wrong; says what to do.
        """
        folder = Path(folder)
        settings = ChatConfig.of(chat_config)
        config = ChatConfigFile.load(folder)
        if settings.conv_template is not None:
            config = _with_template(config, settings.conv_template)
        tokenizer = Tokenizer.load(folder)
        prompts = PromptBuilder(config, tokenizer, str(folder))
        weights = WeightFolder(folder)
        if model_lib is None:
            from relaxlm.runtime.jit import library_for

            library = library_for(folder, device, settings.overrides(), progress, opt)
        else:
            refuse_compile_options(model_lib, opt=opt)
            library = Library.load(model_lib)
            check_device(library, device)
            check_fits_model(library, folder, config)
            check_settings(library, settings.compiled())
        return cls(
            *(folder, config, settings, tokenizer, prompts, weights, library),
            continues_text=_continues_text(prompts),
        )

    @property
    def name(self) -> str:
        """What the model is called: its folder's name."""
        return self.folder.resolve().name

    @property
    def embeds_only(self) -> bool:
        """Whether the library makes vectors of texts and computes no logits."""
        return self.library.metadata.model_task == "embedding"

    @property
    def embedding(self) -> EmbeddingMetadata:
        """How vectors are made of texts."""
        return self.config.embedding(self.library.metadata.is_encoder)

    def refuse_embedding_model(self) -> None:
        """
        Raises:
            RequestError: the model cannot write a reply.
        """
        if self.embeds_only:
            raise no_replies(self.name)

    @property
    def vocab_size(self) -> int:
        """Ids from here on are padding of the weight matrix and never chosen."""
        return min(self.library.metadata.vocab_size, self.tokenizer.vocab_size)

    def settings(
        self, given: GenerationConfig | Mapping[str, Any] | None = None
    ) -> GenerationConfig:
        """A generation's settings: those given, then the caller's, then the folder's.

        Raises:
            RequestError: an unknown option, or a value that is not possible.
        """
        if given is None:
            given = GenerationConfig()
        elif not isinstance(given, GenerationConfig):
            given = GenerationConfig(**given)
        file = self.config
        defaults: dict[str, Any] = {
            "temperature": file.temperature,
            "top_p": file.top_p,
            "repetition_penalty": file.repetition_penalty,
            "presence_penalty": file.presence_penalty,
            "frequency_penalty": file.frequency_penalty,
            "top_k": file.relaxlm.top_k,
            "min_p": file.relaxlm.min_p,
        }
        return given.merged({**defaults, **self.chat_config.sampling()})


def no_replies(name: str) -> RequestError:
    """Why a model does not chat."""
    return RequestError(
        f"{name} is an embedding model: it makes vectors of texts and writes no replies. Use "
        "`relaxlm embed`, ChatModule.embed_text or /v1/embeddings"
    )


def either_name(
    model_lib: str | Path | None, model_lib_path: str | Path | None
) -> str | Path | None:
    """The library's path, which callers may give under two names.

    Raises:
        ConfigError: both are given, and differ.
    """
    if model_lib and model_lib_path and Path(model_lib) != Path(model_lib_path):
        raise ConfigError(
            f"model_lib = {str(model_lib)!r} and model_lib_path = {str(model_lib_path)!r} are two "
            "names of one argument: give one of them"
        )
    return model_lib or model_lib_path


def _continues_text(prompts: PromptBuilder) -> bool:
    if prompts.source == "none":
        return True
    try:
        return prompts.text([{"role": "user", "content": "Once"}]).endswith("Once")
    except TemplateError:
        return False


def _with_template(config: ChatConfigFile, name: str) -> ChatConfigFile:
    """The configuration with a named template in place of the model's own."""
    section = config.relaxlm.model_copy(update={"chat_template": None})
    content = {**config.as_json(), "conv_template": name}
    content["relaxlm"] = section.model_dump(exclude_defaults=True)
    return ChatConfigFile.parse(content, "chat_config")
