import pytest

from data_prep.private_data import EMAIL_WORD, IP_WORD, mask_emails, mask_ips


@pytest.mark.parametrize(
    ("text", "masked", "count"),
    [
        ("write to jane.doe+x@mail.example.org.", f"write to {EMAIL_WORD}.", 1),
        ("(a@b.de, c_d@e-f.co.uk)", f"({EMAIL_WORD}, {EMAIL_WORD})", 2),
        ("mailto:Info@Firma.COM?subject=x", f"mailto:{EMAIL_WORD}?subject=x", 1),
        ("@handle at me@home and a@b", "@handle at me@home and a@b", 0),
        ("x@y.z1 user@@host.com", "x@y.z1 user@@host.com", 0),
        ("no address", "no address", 0),
    ],
)
def test_email_addresses_are_masked(text, masked, count):
    assert mask_emails(text) == (masked, count)


@pytest.mark.parametrize(
    ("text", "masked", "count"),
    [
        ("from 8.8.8.8, then 93.184.216.34.", f"from {IP_WORD}, then {IP_WORD}.", 2),
        ("at 2606:2800:220:1:248:1893:25c8:1946!", f"at {IP_WORD}!", 1),
        ("at 2001:4860:4860::8888", f"at {IP_WORD}", 1),
        (
            "127.0.0.1 192.168.1.1 10.0.0.8 ::1 fe80::1",
            "127.0.0.1 192.168.1.1 10.0.0.8 ::1 fe80::1",
            0,
        ),
        ("version 1.2.3.4.5 of 8.8.8.999", "version 1.2.3.4.5 of 8.8.8.999", 0),
        (
            "at 12:30:45 it was 5:4, C++ std::vector::size",
            "at 12:30:45 it was 5:4, C++ std::vector::size",
            0,
        ),
    ],
)
def test_public_ip_addresses_are_masked(text, masked, count):
    assert mask_ips(text) == (text if masked is None else masked, count)


@pytest.mark.parametrize(
    "text", ["a" * 200_000 + "@", "a." * 100_000 + "@b", "1." * 100_000, ":" * 100_000]
)
def test_long_runs_take_no_longer_than_they_are_long(text):
    # A pattern that goes back and forth over these would run into the test's time limit.
    assert mask_emails(text) == (text, 0)
    assert mask_ips(text) == (text, 0)
