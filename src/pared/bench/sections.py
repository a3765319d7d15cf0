"""The sections that a bench's page is made of. Each takes plain data and can stand on any page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pared.bench import costs_kinds, plots
from pared.bench.figures import Figure, macs, seconds, times
from pared.bench.page import Section, picture

if TYPE_CHECKING:
    from pared.bench.report import Report, Row
