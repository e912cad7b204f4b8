"""What goes wrong with a store, in words: what was found, and the cure. Secrets in a server's answer are never repeated."""

from __future__ import annotations

import os
import re

from nemo_rl.errors import StorageError
from nemo_rl.job import names


class Conflict(StorageError):
    """A conditional write was refused: the object exists already, or is another one than the writer has read."""


class Unavailable(StorageError):
    """The store did not answer, or asked to come back later; the same call may succeed in a while."""


class Missing(StorageError):
    """There is no such object."""


class NoRanges(StorageError):
    """The server gives whole objects alone."""


class Damaged(StorageError):
    """What the store has is not what was saved: missing, of another size or with another digest. Asking again does not help."""


_CAUSES: tuple[tuple[str, str, bool], ...] = (
    # what the answer holds, the sentence, whether waiting may help
    (
        r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist",
        "there is no such bucket; create it, or correct the name",
        False,
    ),
    (
        r"ExpiredToken|TokenRefreshRequired|token (?:has |is )?expired|ExpiredAuthenticationToken",
        "the credentials have expired; get new ones (those of a service account with a role are renewed by themselves, those in a Secret with the next pod)",
        False,
    ),
    (
        r"RequestTimeTooSkewed|RequestExpired|AuthenticationFailed.*time",
        "this machine's clock differs from the server's by more than the store allows; set the clock (timedatectl shows it)",
        False,
    ),
    (
        r"InvalidAccessKeyId|InvalidClientTokenId|XAdminUserNotFound",
        "the server does not know the access key; check AWS_ACCESS_KEY_ID, and AWS_ENDPOINT_URL if it is another server's",
        False,
    ),
    (
        r"SignatureDoesNotMatch",
        "the server refuses the signature: the secret key is not the one of this access key; check AWS_SECRET_ACCESS_KEY",
        False,
    ),
    (
        r"\bInvalidToken\b",
        "the server does not take the session token; unset AWS_SESSION_TOKEN if the access key is another server's, or get a new one",
        False,
    ),
    (
        r"AssumeRoleWithWebIdentity|InvalidIdentityToken|IDPRejectedClaim",
        "the service account's token was not accepted for its role; check the role's trust policy, and the role that the service "
        "account names (eks.amazonaws.com/role-arn)",
        False,
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|301 Moved|region is wrong|expecting '",
        "the bucket is in another region than the one asked; set AWS_REGION to the bucket's region",
        False,
    ),
    (
        r"QuotaExceeded|XMinioStorageFull|InsufficientStorage|code: 507|EntityTooLarge.*quota|No space left",
        "the store has no room left (a quota or its disk is full); free some, or ask for more",
        False,
    ),
    (
        r"169\.254\.169\.254|metadata\.google\.internal|instance metadata|CredentialsNotLoaded|[Mm]issing.*credential"
        r"|InstanceCredentialProvider|no credentials|MetadataHeader|/v\d/credentials\S* in [^-]+ - Server returned non-2xx status code: 4",
        "found no credentials; give them by environment variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and _KEY), on a cluster by envFrom or the service account",
        False,
    ),
    (
        r"SlowDown|code: (?:503|429)|503 S|ServerBusy|TooManyRequests",
        "the store asks to slow down (503); it was asked again and again in vain: try later, or with fewer jobs at once",
        True,
    ),
    (
        r"NotImplemented|code: 501",
        "the server does not know this request; expected one that speaks S3 with conditional writes",
        False,
    ),
)
_SECRETS = re.compile(
    r"(?i)((?:x-amz-(?:signature|credential|security-token)|sig|signature|access_token|authorization|<AWSAccessKeyId>"
    r"|<StringToSign>|<SignatureProvided>)\s*[=:>]\s*)[^&\s<\"]+"
)


def in_words(error: BaseException, doing: str, uri: str) -> StorageError:
    """The error that says what happened while `doing` something with `uri`: Conflict, Unavailable, Missing or StorageError."""
    if isinstance(error, StorageError):
        return error
    kind, text = type(error).__name__, f"{type(error).__name__}: {error}"
    absent = isinstance(error, FileNotFoundError)
    if absent and not any(re.search(pattern, text) for pattern, *_ in _CAUSES[:5]):
        return Missing(f"cannot {doing} {uri}: there is no such object")
    # What replaces an object on condition and finds no bucket is told of a condition that failed.
    if kind in ("AlreadyExistsError", "PreconditionError") and not re.search(_CAUSES[0][0], text):
        return Conflict(f"cannot {doing} {uri}: somebody else wrote it first")
    for pattern, sentence, transient in _CAUSES:
        if re.search(pattern, text):
            return (Unavailable if transient else StorageError)(f"cannot {doing} {uri}: {sentence}{_said(text)}")
    if kind == "UnauthenticatedError":
        return StorageError(
            f"cannot {doing} {uri}: the server asks who we are; give credentials by environment variables, envFrom or the "
            f"service account{_said(text)}"
        )
    if kind == "PermissionDeniedError" or "AccessDenied" in text:
        return StorageError(
            f"cannot {doing} {uri}: these credentials have no right to; allow them to list, read, write and delete objects "
            f"below this address{_said(text)}"
        )
    if re.search(r"RangeNotSupported|[Rr]ange request not supported|non-partial response when range requested", text):
        return NoRanges(f"cannot {doing} {uri} in parts: the server answers a range with the whole object")
    if kind in ("NotSupportedError", "NotImplementedError"):
        return StorageError(f"cannot {doing} {uri}: this kind of store cannot do that{_said(text)}")
    if isinstance(error, OSError | TimeoutError) or re.search(
        r"code: 5\d\d|error sending request|[Cc]onnection|(?<!retry_)[Tt]imed? ?out|dns|reset|decoding response body|response body error|"
        r"end of file|hyper|IncompleteBody|BadDigest|InternalError|request error",
        re.sub(r"https?://\S+", "", text),  # what a user named may hold any of these words
    ):
        return Unavailable(
            f"cannot {doing} {uri}: the store was not reached or broke off; check the address and the network{_in_a_pod()}{_said(text)}"
        )
    return StorageError(f"cannot {doing} {uri}{_said(text)}")


def _in_a_pod() -> str:
    """What closes the way from a job's pod, and from no other place."""
    if not os.environ.get(names.ATTEMPT_VARIABLE):
        return ""
    return (
        "; from a job's pods the network policy lets HTTPS to public addresses pass, and for others what the chart's "
        "networkPolicy.trainers.extraEgress opens"
    )


def _said(text: str) -> str:
    """What the server or the library said, short and without secrets."""
    text = re.split(r"\n\s*Debug source:|\n\nDebug", text)[0]
    text = _SECRETS.sub(r"\1…", " ".join(text.split()))
    return f" ({text[:300]}{'…' if len(text) > 300 else ''})"
