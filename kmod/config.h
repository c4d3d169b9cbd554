/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_CONFIG_H
#define SNIFFER_CONFIG_H

unsigned int sniffer_config_batch(void);
unsigned int sniffer_config_flush_ms(void);
void sniffer_config_set(unsigned int size, unsigned int interval);
int sniffer_config_check(void);

#endif /* SNIFFER_CONFIG_H */
