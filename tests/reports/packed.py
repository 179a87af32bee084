"""What a report holds for its scripts."""

import base64
import gzip
import json
import re
from typing import Any


def packed_in(html: str) -> dict[str, Any]:
    """Its columns and figures, as the page unpacks them."""
    [data] = re.findall(r'<script id="data" type="text/plain">([^<]*)</script>', html)
    return json.loads(gzip.decompress(base64.b64decode(data)))
