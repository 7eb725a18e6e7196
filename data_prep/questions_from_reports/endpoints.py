"""Who can be asked: anything that takes a conversation and gives a `Reply`; here, every OpenAI-compatible server.

A report is patient data. Only servers on this machine are asked unless ``allow_remote`` says otherwise; a request holds
the conversation and no file name, follows no redirect, passes no proxy on its way to this machine, and carries only the
headers that are needed. The key is read from the environment and never logged or stored.

Part of m3d-lamed; import through `m3d`.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from types import ModuleType

    import openai

__all__ = [
    "AskedTooMuch", "Endpoint", "EndpointError", "OpenAIEndpoint", "Reply", "TryAgain", "check_address", "is_local",
]  # fmt: skip

HEADERS = {
    "host", "content-type", "content-length", "transfer-encoding", "accept", "accept-encoding", "connection",
}  # fmt: skip
TRANSIENT = {408, 409, 425, 429}
ADJUSTABLE = ("response_format", "temperature", "seed", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was said; ``refused`` holds the reason of a refusal, tokens are None where nobody counted them."""

    text: str
    refused: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class TryAgain(Exception):
    """This call failed and the next may not; ``wait`` is how long the server asked for, in seconds."""

    def __init__(self, reason: str, *, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class AskedTooMuch(Exception):
    """This conversation will never be answered, such as one that is too long; others may be."""


class EndpointError(OSError):
    """No call will be answered: a wrong key, a wrong model, a server that is down."""


class Endpoint(Protocol):
    """``model`` is kept with every question, ``kind`` says how it was reached."""

    model: str
    kind: str

    async def chat(self, messages: Sequence[Mapping[str, str]], *, seed: int) -> Reply:
        """Answer a conversation, or raise `TryAgain`, `AskedTooMuch` or `EndpointError`."""

    async def close(self) -> None:
        """Let go of connections."""


class OpenAIEndpoint:
    """A server with ``/chat/completions`` below ``base_url``: vLLM, llama.cpp, Ollama, TGI, a gateway, OpenAI itself.

    What a server does not take (``response_format``, ``temperature``, ``seed``, ``max_tokens``) it is not sent twice.
    """

    kind = "openai-compatible"

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key_env: str | None = None,
        allow_remote: bool = False,
        timeout: float = 120.0,
        max_tokens: int = 1500,
        temperature: float = 0.0,
    ) -> None:
        check_address(base_url, allow_remote=allow_remote)
        self.model, self.base_url, self.timeout = model, base_url, timeout
        self._key_name, self._key = api_key_env, _key(api_key_env)
        self._options: dict[str, Any] = {
            "response_format": {"type": "json_object"},
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": 0,
        }
        self._openai = _openai()
        self._client = self._connect()

    async def chat(self, messages: Sequence[Mapping[str, str]], *, seed: int) -> Reply:
        """Ask once; parameters that this server refuses are left out from then on."""
        while True:
            sent = dict(self._options)
            if "seed" in sent:
                sent["seed"] = seed
            try:
                async with asyncio.timeout(self.timeout):
                    body = await self._post(messages, sent)
                return _read(body)
            except self._openai.APIStatusError as error:
                if not self._adjusted(error, sent):
                    return self._failed(error)
            except (self._openai.APITimeoutError, TimeoutError):
                raise TryAgain("timeout") from None
            except self._openai.APIConnectionError as error:
                raise TryAgain(f"connection: {type(error.__cause__ or error).__name__}") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _post(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """What the server said, as JSON has it; None where it is no JSON object."""
        create: Any = self._client.chat.completions.create
        try:
            said = await create(model=self.model, messages=[dict(message) for message in messages], **options)
            return said.model_dump(warnings=False) if hasattr(said, "model_dump") else None
        except ValueError:  # a body that calls itself JSON and is none
            return None

    def _connect(self) -> openai.AsyncOpenAI:
        async def only_what_is_needed(request: Any) -> None:  # noqa: ANN401 - httpx and httpx2 are both served
            for name in [name for name in request.headers if name.lower() not in HEADERS]:
                del request.headers[name]
            request.headers["User-Agent"] = "m3d-lamed"
            request.headers.pop("Authorization", None)  # the SDK takes keys of other services from the environment
            if self._key is not None:
                request.headers["Authorization"] = f"Bearer {self._key}"

        http = self._openai.DefaultAsyncHttpxClient(
            event_hooks={"request": [only_what_is_needed]},
            follow_redirects=False,
            trust_env=not is_local(self.base_url),
            timeout=self.timeout,
        )
        client: openai.AsyncOpenAI = self._openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key or "none", http_client=http, timeout=self.timeout, max_retries=0
        )
        return client

    def _adjusted(self, error: openai.APIStatusError, sent: Mapping[str, Any]) -> bool:
        """Whether a parameter was the trouble, which is then left out or renamed."""
        if error.status_code not in (400, 422):
            return False
        complaint = f"{error.body} {error.message}"
        named = [name for name in ADJUSTABLE if name in sent and name in complaint]
        if not named:
            return False
        for name in named:
            value = self._options.pop(name, None)
            if name == "max_tokens" and value is not None and "max_completion_tokens" in complaint:
                self._options["max_completion_tokens"] = value
        return True

    def _failed(self, error: openai.APIStatusError) -> Reply:
        """A refusal as a reply, anything else as the exception that fits."""
        status, code = error.status_code, str(error.code or error.type or "")
        if "content_filter" in code or "content_policy" in code:
            return Reply(text="", refused=f"content filter of the server (HTTP {status})")
        if status == 413 or "context_length" in code or "context length" in error.message:
            raise AskedTooMuch(f"longer than the model's context (HTTP {status})")
        if "insufficient_quota" in code:
            raise EndpointError(f"{self.base_url}: the account has no quota left ({code}); run again when it has")
        if status in TRANSIENT or status >= 500:
            raise TryAgain(f"http {status}", wait=_retry_after(error.response.headers))
        raise EndpointError(f"{self.base_url}: {self._remedy(status)} (HTTP {status}{f', {code}' if code else ''})")

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return f"the key is refused; check the variable {self._key_name or '(none was named)'}"
        if status == 404:
            return f"no such address or model {self.model!r}; the base URL usually ends in /v1"
        if 300 <= status < 400:
            return "it redirects elsewhere, which is not followed; give the final address"
        return "the request is not accepted; is it an OpenAI-compatible server, with that model?"


def is_local(base_url: str) -> bool:
    """Whether an address can only be this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_address(base_url: str, *, allow_remote: bool) -> None:
    """Refuse an address that is none, holds a password, or is not this machine unless that is allowed.

    Raises:
        ValueError: Any of these; the message says how to go on.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() or c == "\\" for c in base_url):
        raise ValueError(f"base URL {base_url!r} is no http(s) address, such as http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the base URL holds a user name or password; name the variable of a key with --api-key-env")
    if not allow_remote and not is_local(base_url):
        raise ValueError(
            f"{parts.hostname} is not this machine, and reports are patient data: use a server on localhost, "
            "or say --allow-remote if these texts may leave it"
        )


def _openai() -> ModuleType:
    try:
        import openai
    except ModuleNotFoundError:
        raise ModuleNotFoundError("'openai' is needed to ask a server: pip install 'm3d-lamed[llm]'") from None
    return openai


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(f"the variable {name} is not set; it should hold the server's key (give a name, not the key)")
    return key


def _read(content: Any) -> Reply:  # noqa: ANN401 - whatever a server sent
    """The reply in a server's answer; what has another form is as good as no answer."""
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
    except (LookupError, TypeError, AttributeError):
        raise TryAgain("unreadable body") from None
    if isinstance(text, list):
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    refused = message.get("refusal") or None
    if refused is None and choice.get("finish_reason") == "content_filter":
        refused = "content filter"
    usage = content.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        text=str(text),
        refused=None if refused is None else str(refused),
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from either form of the header."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
