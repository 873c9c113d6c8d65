from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "coordinator_key", "started_at", "components", "sites", "running_runs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_KEY_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_RUNS_FIELD_NUMBER: _ClassVar[int]
    version: str
    coordinator_key: str
    started_at: float
    components: _containers.RepeatedCompositeFieldContainer[ComponentState]
    sites: int
    running_runs: int
    def __init__(self, version: _Optional[str] = ..., coordinator_key: _Optional[str] = ..., started_at: _Optional[float] = ..., components: _Optional[_Iterable[_Union[ComponentState, _Mapping]]] = ..., sites: _Optional[int] = ..., running_runs: _Optional[int] = ...) -> None: ...

class ComponentState(_message.Message):
    __slots__ = ("name", "state", "address")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    address: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class InviteSiteRequest(_message.Message):
    __slots__ = ("site", "ttl_s")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    site: str
    ttl_s: float
    def __init__(self, site: _Optional[str] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class InviteSiteReply(_message.Message):
    __slots__ = ("site", "token", "expires_at")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    site: str
    token: str
    expires_at: float
    def __init__(self, site: _Optional[str] = ..., token: _Optional[str] = ..., expires_at: _Optional[float] = ...) -> None: ...

class ListSitesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSitesReply(_message.Message):
    __slots__ = ("sites",)
    SITES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedCompositeFieldContainer[Site]
    def __init__(self, sites: _Optional[_Iterable[_Union[Site, _Mapping]]] = ...) -> None: ...

class SiteRequest(_message.Message):
    __slots__ = ("site", "reason")
    SITE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    site: str
    reason: str
    def __init__(self, site: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Site(_message.Message):
    __slots__ = ("site", "state", "signing_key", "certificate_fingerprint", "node_key_fingerprint", "node_id", "invited_at", "enrolled_at", "certificate_expires_at", "last_seen_at", "online", "revoked_at", "runs", "epsilon_spent_total", "delta", "base_model", "base_targets", "base_announced_at")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INVITED_AT_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_AT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AT_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    REVOKED_AT_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_TARGETS_FIELD_NUMBER: _ClassVar[int]
    BASE_ANNOUNCED_AT_FIELD_NUMBER: _ClassVar[int]
    site: str
    state: str
    signing_key: str
    certificate_fingerprint: str
    node_key_fingerprint: str
    node_id: str
    invited_at: float
    enrolled_at: float
    certificate_expires_at: float
    last_seen_at: float
    online: bool
    revoked_at: float
    runs: _containers.RepeatedScalarFieldContainer[str]
    epsilon_spent_total: float
    delta: float
    base_model: str
    base_targets: _containers.RepeatedScalarFieldContainer[str]
    base_announced_at: float
    def __init__(self, site: _Optional[str] = ..., state: _Optional[str] = ..., signing_key: _Optional[str] = ..., certificate_fingerprint: _Optional[str] = ..., node_key_fingerprint: _Optional[str] = ..., node_id: _Optional[str] = ..., invited_at: _Optional[float] = ..., enrolled_at: _Optional[float] = ..., certificate_expires_at: _Optional[float] = ..., last_seen_at: _Optional[float] = ..., online: _Optional[bool] = ..., revoked_at: _Optional[float] = ..., runs: _Optional[_Iterable[str]] = ..., epsilon_spent_total: _Optional[float] = ..., delta: _Optional[float] = ..., base_model: _Optional[str] = ..., base_targets: _Optional[_Iterable[str]] = ..., base_announced_at: _Optional[float] = ...) -> None: ...

class PlanRunRequest(_message.Message):
    __slots__ = ("spec_toml", "wait_s")
    SPEC_TOML_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    spec_toml: str
    wait_s: float
    def __init__(self, spec_toml: _Optional[str] = ..., wait_s: _Optional[float] = ...) -> None: ...

class SitePlan(_message.Message):
    __slots__ = ("site", "status", "rounds_asked", "rounds_affordable", "noise_that_fits", "objections", "last_seen_at", "document_json")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_ASKED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_AFFORDABLE_FIELD_NUMBER: _ClassVar[int]
    NOISE_THAT_FITS_FIELD_NUMBER: _ClassVar[int]
    OBJECTIONS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    site: str
    status: str
    rounds_asked: int
    rounds_affordable: int
    noise_that_fits: float
    objections: _containers.RepeatedScalarFieldContainer[str]
    last_seen_at: float
    document_json: str
    def __init__(self, site: _Optional[str] = ..., status: _Optional[str] = ..., rounds_asked: _Optional[int] = ..., rounds_affordable: _Optional[int] = ..., noise_that_fits: _Optional[float] = ..., objections: _Optional[_Iterable[str]] = ..., last_seen_at: _Optional[float] = ..., document_json: _Optional[str] = ...) -> None: ...

class LaunchRunRequest(_message.Message):
    __slots__ = ("spec_toml", "force")
    SPEC_TOML_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    spec_toml: str
    force: bool
    def __init__(self, spec_toml: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("run", "state", "reason", "rounds", "rounds_committed", "spec_digest", "spec_json", "created_at", "updated_at", "history", "sites", "warnings", "reason_code")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    REASON_CODE_FIELD_NUMBER: _ClassVar[int]
    run: str
    state: str
    reason: str
    rounds: int
    rounds_committed: int
    spec_digest: str
    spec_json: str
    created_at: float
    updated_at: float
    history: _containers.RepeatedCompositeFieldContainer[Round]
    sites: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    reason_code: str
    def __init__(self, run: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., rounds: _Optional[int] = ..., rounds_committed: _Optional[int] = ..., spec_digest: _Optional[str] = ..., spec_json: _Optional[str] = ..., created_at: _Optional[float] = ..., updated_at: _Optional[float] = ..., history: _Optional[_Iterable[_Union[Round, _Mapping]]] = ..., sites: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., reason_code: _Optional[str] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("round", "state", "adapter_digest", "committed_at", "seconds", "bytes", "replies")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    round: int
    state: str
    adapter_digest: str
    committed_at: float
    seconds: float
    bytes: int
    replies: _containers.RepeatedCompositeFieldContainer[SiteReply]
    def __init__(self, round: _Optional[int] = ..., state: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., committed_at: _Optional[float] = ..., seconds: _Optional[float] = ..., bytes: _Optional[int] = ..., replies: _Optional[_Iterable[_Union[SiteReply, _Mapping]]] = ...) -> None: ...

class SiteReply(_message.Message):
    __slots__ = ("site", "status", "code", "message", "epsilon_spent_total", "delta")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EPSILON_SPENT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    site: str
    status: str
    code: str
    message: str
    epsilon_spent_total: float
    delta: float
    def __init__(self, site: _Optional[str] = ..., status: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., epsilon_spent_total: _Optional[float] = ..., delta: _Optional[float] = ...) -> None: ...

class WatchRunRequest(_message.Message):
    __slots__ = ("run", "after", "until_now", "site")
    RUN_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    UNTIL_NOW_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    run: str
    after: int
    until_now: bool
    site: str
    def __init__(self, run: _Optional[str] = ..., after: _Optional[int] = ..., until_now: _Optional[bool] = ..., site: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "run", "at", "kind", "round", "site", "message", "data_json")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    number: int
    run: str
    at: float
    kind: str
    round: int
    site: str
    message: str
    data_json: str
    def __init__(self, number: _Optional[int] = ..., run: _Optional[str] = ..., at: _Optional[float] = ..., kind: _Optional[str] = ..., round: _Optional[int] = ..., site: _Optional[str] = ..., message: _Optional[str] = ..., data_json: _Optional[str] = ...) -> None: ...

class ListReceiptsRequest(_message.Message):
    __slots__ = ("site", "run")
    SITE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    site: str
    run: str
    def __init__(self, site: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class ReceiptRecord(_message.Message):
    __slots__ = ("document_json", "received_at")
    DOCUMENT_JSON_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AT_FIELD_NUMBER: _ClassVar[int]
    document_json: str
    received_at: float
    def __init__(self, document_json: _Optional[str] = ..., received_at: _Optional[float] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ListAdaptersReply(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("run", "round", "digest", "bytes", "committed_at", "released_as")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_AT_FIELD_NUMBER: _ClassVar[int]
    RELEASED_AS_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    digest: str
    bytes: int
    committed_at: float
    released_as: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ..., committed_at: _Optional[float] = ..., released_as: _Optional[_Iterable[str]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("run", "round", "released_as")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RELEASED_AS_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    released_as: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., released_as: _Optional[str] = ...) -> None: ...

class PromoteAdapterRequest(_message.Message):
    __slots__ = ("run", "round", "name")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    name: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("name", "adapter", "promoted_by", "promoted_at", "current")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_BY_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_AT_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    adapter: Adapter
    promoted_by: str
    promoted_at: float
    current: bool
    def __init__(self, name: _Optional[str] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., promoted_by: _Optional[str] = ..., promoted_at: _Optional[float] = ..., current: _Optional[bool] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("name", "history")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    name: str
    history: bool
    def __init__(self, name: _Optional[str] = ..., history: _Optional[bool] = ...) -> None: ...

class ListReleasesReply(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ...) -> None: ...

class ListAdminLogRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class AdminLogEntry(_message.Message):
    __slots__ = ("seq", "kind", "body", "prev_hash", "hash", "signature", "created_at")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    PREV_HASH_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    seq: int
    kind: str
    body: str
    prev_hash: str
    hash: str
    signature: str
    created_at: str
    def __init__(self, seq: _Optional[int] = ..., kind: _Optional[str] = ..., body: _Optional[str] = ..., prev_hash: _Optional[str] = ..., hash: _Optional[str] = ..., signature: _Optional[str] = ..., created_at: _Optional[str] = ...) -> None: ...

class AdapterChunk(_message.Message):
    __slots__ = ("data", "adapter")
    DATA_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    adapter: Adapter
    def __init__(self, data: _Optional[bytes] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...
