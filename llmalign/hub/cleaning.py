"""JSON without secrets and without paths of this machine, and the check that none of them is left."""

import json
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

from llmalign.errors import UserError
from llmalign.secrets import HIDDEN, redacted

# Of records: a command line to go on with, where the run lies, and texts of the training data.
DROPPED = ("next", "output_dir", "frequent_captions")
SECRET = re.compile(
    r"(^|_)(token|password|passwd|secret|secret_?key|api_?key|access_?key|auth|authorization|credentials?)$"
    r"|(access|auth|api|bearer|hub|refresh)token$"
)
# In a model's configuration any other word before _token names a token of its vocabulary.
CREDENTIAL = re.compile(
    r"(^|_)(password|passwd|secret|secret_?key|api_?key|access_?key|auth|authorization|credentials?)$"
    r"|^token$|(^|_)(hf|hub|huggingface|auth|access|api|bearer|refresh|wandb|github)_?token$"
)
VOCABULARY = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|image|video|audio)_token$")
# Of configurations: tokens, labels and templates, where a slash is part of the text.
VERBATIM = re.compile(
    r"(_token|_tokens|chat_template|added_tokens_decoder|id2label|label2id|stop_strings|pattern|regex|prompts)$"
)
PATH_KEY = re.compile(r"(path|file|dir|folder)$")
ABSOLUTE = re.compile(r"(?:file://)?(?:~[\w.-]*)?/|[A-Za-z]:[\\/]|\\\\")
_PART = r"[^\s/\\\"'`,;:|<>()\[\]{}]+"
INSIDE = re.compile(
    rf"(?<![\w/.~-])(?:(?:file://)?/{_PART}(?:/{_PART})+/?|~[\w.-]*(?:/{_PART})+/?|[A-Za-z]:[\\/]{_PART}(?:[\\/]{_PART})*)"
)
USER_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s?#]*@", re.IGNORECASE)
KEY_IN_URL = re.compile(r"([?&][\w-]*(?:token|key|password|secret|sig(?:nature)?)=)[^&\s#]+", re.IGNORECASE)
CHECKED = (".json", ".md", ".csv", ".txt", ".jinja")
UNCHECKED = re.compile(r"tokenizer\.json|vocab\..*|merges\.txt|added_tokens\.json")


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UserError for a half-written one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); is it half-written?") from error


def cleaned(content: Any) -> Any:
    """A record without secrets and texts of data, and with the last part alone of every absolute path, keys too."""
    if isinstance(content, dict):
        found: dict[Any, Any] = {}
        for key, value in content.items():
            if key not in DROPPED and not _is_secret(str(key)):
                found[_free(cleaned_text(key) if isinstance(key, str) else key, found)] = cleaned(value)
        return found
    if isinstance(content, list):
        return [cleaned(value) for value in content]
    return cleaned_text(content) if isinstance(content, str) else content


def cleaned_config(content: Any, key: str = "") -> Any:
    """A model's configuration without credentials and with the last part of its paths; its tokens stay as they are."""
    if VERBATIM.search(key):
        return content
    if isinstance(content, dict):
        return {name: cleaned_config(value, name) for name, value in content.items() if not _is_credential(name, value)}
    if isinstance(content, list):
        return [cleaned_config(value, key) for value in content]
    if not isinstance(content, str):
        return content
    text = _without_secrets(content)
    is_path = PATH_KEY.search(key) or re.match(r"([A-Za-z]:|~[\w.-]*|file://)?[\\/]+[^\\/]+[\\/]", text)
    return _last_part(text) if is_path else text


def cleaned_text(text: str) -> str:
    """A text without secrets and with the last part alone of a path that it is or holds."""
    text = _last_part(_without_secrets(text))
    home = _home()
    if home is not None:  # first, because its name may hold spaces
        text = re.sub(rf"(?<![\w.-]){re.escape(str(home))}(?![\w-])", "~", text)
    return INSIDE.sub(lambda found: _last_part(found[0]), text)


def check_clean(folder: Path, names: list[str], run: Path) -> None:
    """Raises UserError, naming file and key or line, for a text that holds the home, the run's path or the token."""
    home, token = _home(), get_token()
    places = {str(run.absolute()), str(run.resolve()), *([str(home), str(home.resolve())] if home else [])}
    places = {place for place in places if Path(place).parent != Path(place)}
    texts = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    paths = re.compile(rf"(?<![\w.-])(?:{texts})(?![\w-])") if places else None
    for name in names:
        if Path(name).suffix not in CHECKED or UNCHECKED.fullmatch(Path(name).name):
            continue
        for where, text in _texts(folder / name):
            if token and token in text:
                raise UserError(f"{name} holds the token of the Hub ({where.replace(token, '***')}): take it out first")
            if paths is not None and (found := paths.search(text)):
                raise UserError(f"{name} holds a path of this machine, {found[0]} ({where}): take it out first")


def _texts(path: Path) -> list[tuple[str, str]]:
    """All texts of a file, each with its key or its line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        return list(_leaves(read_json(path), ""))
    return [(f"line {number}", line) for number, line in enumerate(text.splitlines(), 1)]


def _leaves(content: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(content, dict):
        inside = [(f"{key}.{name}" if key else name, name, value) for name, value in content.items()]
    elif isinstance(content, list):
        inside = [(f"{key}[{index}]", "", value) for index, value in enumerate(content)]
    else:
        return [(f"key {key}", content)] if isinstance(content, str) else []
    return [leaf for where, name, value in inside for leaf in [(f"key {where}", name), *_leaves(value, where)]]


def _last_part(text: str) -> str:
    """The last part of a text that is an absolute path, spaces included; other texts as they are."""
    if not ABSOLUTE.match(text) or "\n" in text:
        return text
    return PureWindowsPath(text).name or text  # which knows both slashes


def _without_secrets(text: str) -> str:
    return redacted(KEY_IN_URL.sub(rf"\1{HIDDEN}", USER_IN_URL.sub(r"\1", text)))


def _is_secret(key: str) -> bool:
    key = key.lower().replace("-", "_")
    return SECRET.search(key) is not None and VOCABULARY.match(key) is None


def _is_credential(key: str, value: Any) -> bool:
    """Only texts can be: `use_auth_token: false` tells nothing."""
    return isinstance(value, str) and CREDENTIAL.search(key.lower().replace("-", "_")) is not None


def _free(key: Any, taken: dict[Any, Any]) -> Any:
    """A key that is not taken: two paths may end in the same name."""
    names = (f"{key} ({number})" for number in range(2, len(taken) + 3))
    return key if key not in taken else next(name for name in names if name not in taken)


def _home() -> Path | None:
    """The home of the user; none where it is not known or is the root, which would be in everything."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return None if home.parent == home else home
