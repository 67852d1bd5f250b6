"""The measuring instrument behind docs/performance.md: `python -m bench`. No part of the product imports it."""
