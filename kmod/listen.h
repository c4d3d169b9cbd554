/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_LISTEN_H
#define SNIFFER_LISTEN_H

void sniffer_listen_update(void);
void sniffer_listen_init(void);
void sniffer_listen_exit(void);

#endif /* SNIFFER_LISTEN_H */
