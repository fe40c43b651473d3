"""The workbook's interactive views, each with a still twin."""
