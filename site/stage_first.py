"""Quarto runs this before it renders the project's own folder: the notebooks there are sources,
their pages are staged first"""

import sys

sys.exit(
    "The site is made from a staged copy of the notebooks. Run `make site` (or `cot-distill "
    "site`): it stages them in _proc/ and renders that to _site/."
)
