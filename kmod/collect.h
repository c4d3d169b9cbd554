/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_COLLECT_H
#define SNIFFER_COLLECT_H

void sniffer_collect_init(void);
void sniffer_collect_exit(void);

#endif /* SNIFFER_COLLECT_H */
