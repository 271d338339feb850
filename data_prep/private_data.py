"""E-mail addresses and IP addresses in texts, replaced by words that say what stood there.

- `mask_emails`, `mask_ips`: a text without them, and how many there were.

Every address of a kind becomes the same word, so that no model learns one. Private and reserved
IP addresses (127.0.0.1, 192.168.0.0/16, ...) name nobody and stay, and so does what only looks
like one: numbers of versions with a part above 255.
"""

import ipaddress
import re

EMAIL_WORD = "email@example.com"
IP_WORD = "192.0.2.1"
"""Of the block that RFC 5737 keeps for documentation."""

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    r"[A-Za-z]{2,24}(?![\w-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f:]{6,39}(?![\w:])")


def mask_emails(text: str) -> tuple[str, int]:
    """Replace e-mail addresses.

    Args:
        text: Any text.

    Returns:
        The text, and how many were replaced.
    """
    return _EMAIL.subn(EMAIL_WORD, text) if "@" in text else (text, 0)


def mask_ips(text: str) -> tuple[str, int]:
    """Replace the IP addresses (v4 and v6) that can be reached from everywhere.

    Args:
        text: Any text.

    Returns:
        The text, and how many were replaced.
    """
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        try:
            is_public = ipaddress.ip_address(match[0]).is_global
        except ValueError:
            return match[0]
        count += is_public
        return IP_WORD if is_public else match[0]

    return _IPV6.sub(replace, _IPV4.sub(replace, text)), count
