"""Loads a checkpoint's tokenizer and chat templates, and checks that Starfish can serve them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from gateway.chat_templates import DEFAULT, ChatTemplates, read_template, read_template_sources
from gateway.detokenizer import TokenBytes
from gateway.prompt_encoder import DistrustingEncoder, PromptEncoder, TrustingEncoder
from gateway.text_encoder import TextEncoder
from gateway.token_decoder import read_token_decoder
from gateway.tokenizer import ModelTokenizer
from gateway.tokenizer_files import TokenizerFiles, read_tokenizer_files
from shared.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerOptions:
    """`chat_template` replaces those of the checkpoint. `trust_special_tokens`: special tokens in
    texts of clients are special tokens; else they are text."""

    chat_template: Path | None = None
    trust_special_tokens: bool = True


def load_tokenizer(folder: Path, clock: Clock, options: TokenizerOptions) -> ModelTokenizer:
    """Blocks. Raises CheckpointError if the tokenizer is missing or of an unknown kind. A chat
    template that does not compile is refused when a chat needs it."""
    files = read_tokenizer_files(folder)
    decoder = read_token_decoder(files.plain)
    tokenizer = files.tokenizer
    if options.chat_template is not None:
        sources = {DEFAULT: read_template(options.chat_template)}
    else:
        sources = read_template_sources(folder, files.config)
    templates = ChatTemplates(sources, files.names, clock)
    added = tokenizer.get_added_tokens_decoder()
    special_ids = {
        token_id for token_id, token in added.items() if _is_skipped(tokenizer, token_id, token)
    }
    normalised = {
        token_id: decoder.bytes_of(shown).decode(errors="replace")
        for token_id, token in added.items()
        if (shown := tokenizer.id_to_token(token_id) or token.content) != token.content
    }
    texts = {token_id: token.content for token_id, token in added.items()} | normalised
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = TokenBytes(vocabulary, special_ids, decoder).showing(
        {token_id: text for token_id, text in normalised.items() if token_id not in special_ids}
    )
    return ModelTokenizer(
        _encoder(files, templates, trusts=options.trust_special_tokens),
        templates,
        token_bytes,
        token_bytes.showing({token_id: texts[token_id] for token_id in special_ids}),
        {token.content: token_id for token_id, token in added.items()},
    )


def _is_skipped(tokenizer: Tokenizer, token_id: int, token: AddedToken) -> bool:
    """Whether a text without special tokens lacks this added one. Its flag alone does not say it:
    what a file once called special stays so, and a token that the normaliser changes is none."""
    if tokenizer.decode([token_id], skip_special_tokens=True):
        return False
    shown = tokenizer.decode([token_id], skip_special_tokens=False)
    return bool(shown) or token.special


def _encoder(files: TokenizerFiles, templates: ChatTemplates, *, trusts: bool) -> PromptEncoder:
    encoder = TextEncoder(files.tokenizer)
    if trusts:
        return TrustingEncoder(encoder)
    plain = Tokenizer.from_str(json.dumps({**files.plain, "added_tokens": []}))
    plain.no_truncation()
    plain.no_padding()
    return DistrustingEncoder(
        encoder,
        TextEncoder(plain),
        around=_tokens_around(files.tokenizer),
        id_of=_control_tokens(files, templates.literal_text),
    )


def _control_tokens(files: TokenizerFiles, literal_text: str) -> Mapping[str, int]:
    """As transformers: special tokens, and added ones that the templates write. White space is
    neither, because templates write it as text."""
    listed = files.config.get("chat_control_tokens")
    wanted = listed if isinstance(listed, list) else None
    return {
        token.content: token_id
        for token_id, token in files.tokenizer.get_added_tokens_decoder().items()
        if token.special
        or (
            token.content in literal_text and not token.content.isspace()
            if wanted is None
            else token.content in wanted
        )
    }


def _tokens_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after a prompt."""
    encoding = tokenizer.encode("a")
    is_inserted = encoding.special_tokens_mask
    first = is_inserted.index(0)
    last = len(is_inserted) - is_inserted[::-1].index(0)
    return tuple(encoding.ids[:first]), tuple(encoding.ids[last:])
