"""The report on a finished output: ``read`` its numbers, draw them as a ``page``
(HTML) and as ``figures`` (PNG). What was not measured is said, not drawn."""
