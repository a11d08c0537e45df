"""What goes in: data sources, their samples and splits; decoding of one image.

    a folder, a manifest or a built-in name  ──>  open_source  ──>  DataSource: samples

Nothing here imports torch, scikit-learn or Pillow before it has to.
"""

from __future__ import annotations

from pipeline.data.samples import DataSource, Sample
from pipeline.data.sources import open_source

__all__ = ["DataSource", "Sample", "open_source"]
