"""A small HTTP server that misbehaves on demand: what providers, proxies and networks do on bad
days.

Speaks enough of OpenAI's chat completions, models, files and batches, and of Gemini's
generateContent. A `Script` decides what happens to each request; every request is counted and
kept."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Reply:
    "What the server does with one request"

    status: int = 200
    body: bytes | str | dict | list | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    how: str = "whole"  # reset | short | drip | blank_lines | stall | raw: body is all there is
    content_type: str = "application/json"


def completion(
    text: str | None = "3 * 4 = 12\n#### 12",
    finish: str | None = "stop",
    model: str = "test-model",
    usage: bool = True,
    **message,
) -> dict:
    "A chat completion as a provider would send it"
    data = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
    }
    return data | (
        {"usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}}
        if usage
        else {}
    )


def error(message: str, code: str | None = None, **more) -> dict:
    return {"error": {"message": message, "code": code, **more}}


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict


class FaultyServer:
    "Runs in a thread: `with FaultyServer(script) as server: server.url, server.requests`"

    def __init__(
        self, script: Callable[[Request, int], Reply] | None = None, models: list[str] | None = None
    ):
        self.script = script or (lambda request, n: Reply(body=completion()))
        self.models = ["test-model"] if models is None else models
        self.requests: list[Request] = []  # completions only
        self.all_requests: list[Request] = []
        self.in_flight = self.max_in_flight = 0
        self.extra: Callable[[Request], Reply | None] = lambda request: None

    def __enter__(self) -> "FaultyServer":
        started = threading.Event()
        self.loop = asyncio.new_event_loop()

        def body() -> None:
            asyncio.set_event_loop(self.loop)
            self.server = self.loop.run_until_complete(
                asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
            )
            self.port = self.server.sockets[0].getsockname()[1]
            started.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()
        started.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        async def shut() -> None:
            self.server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        asyncio.run_coroutine_threadsafe(shut(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await self._read(reader):
                if not await self._answer(request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {
            k.strip().lower(): v.strip()
            for k, _, v in (line.partition(":") for line in lines if line)
        }
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        try:
            body = json.loads(raw) if raw else {}
        except ValueError:
            body = {"raw": raw.decode("utf-8", "replace")}
        return Request(method, path, headers, body)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        self.all_requests.append(request)
        if (reply := self.extra(request)) is not None:
            return await self._send(reply, writer)
        if request.method == "GET":
            return await self._send(
                Reply(
                    body={
                        "object": "list",
                        "data": [{"id": m, "object": "model"} for m in self.models],
                    }
                ),
                writer,
            )
        self.requests.append(request)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            return await self._send(self.script(request, len(self.requests)), writer)
        finally:
            self.in_flight -= 1

    async def _send(self, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        "Send a reply the way it wants to be sent; False closes the connection"
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        if reply.how == "reset":
            writer.transport.abort()
            return False
        if reply.how == "raw":
            writer.write(reply.body)
            await writer.drain()
            return False
        body = (
            reply.body
            if isinstance(reply.body, bytes)
            else (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
            if reply.body is not None
            else b""
        )
        filler = b"\n" * 200 if reply.how == "blank_lines" else b""
        length = len(body) + len(filler) + (50 if reply.how == "short" else 0)
        lines = [
            f"HTTP/1.1 {reply.status} X",
            f"Content-Type: {reply.content_type}",
            f"Content-Length: {length}",
            *(f"{k}: {v}" for k, v in reply.headers.items()),
        ]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if reply.how == "stall":
            await writer.drain()
            await asyncio.sleep(3600)
        if reply.how == "drip":
            for i in range(len(body)):
                writer.write(body[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0.2)
        elif reply.how == "blank_lines":
            for i in range(len(filler)):
                writer.write(filler[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0.2)
            writer.write(body)
        else:
            writer.write(body)
        await writer.drain()
        return reply.how == "whole"


def gemini_reply(text: str = "#### 19", finish: str = "STOP", **more: object) -> dict:
    "What Gemini answers when all is well"
    return {
        "candidates": [
            {"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": finish}
        ],
        "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 4},
        "modelVersion": "gemini-x-001",
    } | more
