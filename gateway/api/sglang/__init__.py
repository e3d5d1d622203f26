"""SGLang's own API, beside the one that is OpenAI's."""
