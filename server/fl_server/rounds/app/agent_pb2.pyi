from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("header", "reply", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: RoundHeader
    reply: ReplyHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[RoundHeader, _Mapping]] = ..., reply: _Optional[_Union[ReplyHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class RoundHeader(_message.Message):
    __slots__ = ("manifest_json", "adapter_bytes", "adapter_digest", "spec_json")
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    manifest_json: str
    adapter_bytes: int
    adapter_digest: str
    spec_json: str
    def __init__(self, manifest_json: _Optional[str] = ..., adapter_bytes: _Optional[int] = ..., adapter_digest: _Optional[str] = ..., spec_json: _Optional[str] = ...) -> None: ...

class ReplyHeader(_message.Message):
    __slots__ = ("status", "document_json", "adapter_bytes", "adapter_digest")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    status: str
    document_json: str
    adapter_bytes: int
    adapter_digest: str
    def __init__(self, status: _Optional[str] = ..., document_json: _Optional[str] = ..., adapter_bytes: _Optional[int] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("site", "version", "state", "problems")
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    site: str
    version: str
    state: str
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, site: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[str] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...
